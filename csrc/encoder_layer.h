// What the encoder layer op asks of its arguments, on CPUs and GPUs.
#pragma once

#include <vector>

#include "activation.h"
#include "tensor_view.h"

namespace llmos {

// Raise an error unless attn_mask broadcasts to [batch, heads, length, length], and padding is
// [batch, length].
inline void check_masks(const Optional& mask, const Optional& padding, int64_t batch, int64_t heads,
                        int64_t length) {
  const int64_t sizes[] = {batch, heads, length, length};
  STD_TORCH_CHECK(!mask || mask->dim() == 4, "encoder_layer: attn_mask must have 4 dimensions");
  for (int64_t i = 0; mask && i < 4; ++i)
    STD_TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == sizes[i], "encoder_layer: dimension ", i,
                    " of attn_mask must be 1 or ", sizes[i], ", got ", mask->size(i));
  if (padding)
    STD_TORCH_CHECK(padding->scalar_type() == ScalarType::Bool && padding->dim() == 2 &&
                        padding->size(0) == batch && padding->size(1) == length,
                    "encoder_layer: key_padding_mask must be bool [", batch, ", ", length, "]");
}

// Raise an error unless the arguments fit together; weights and biases have checks of their own.
inline void check_encoder_layer(const Tensor& src, const Optional& mask, const Optional& padding,
                                const std::vector<Tensor>& in_weights,
                                const std::vector<Tensor>& in_biases, int64_t heads,
                                Activation activation) {
  STD_TORCH_CHECK(src.dim() == 3 && src.is_contiguous(),
                  "encoder_layer: src must be contiguous [batch, length, d], got ", src.dim(),
                  " dimensions");
  const int64_t batch = src.size(0), length = src.size(1), d = src.size(2);
  STD_TORCH_CHECK(heads > 0 && d % heads == 0 && d / heads <= 256, "encoder_layer: ", heads,
                  " heads cannot share ", d, " features, at most 256 each");
  check_masks(mask, padding, batch, heads, length);
  const size_t count = in_weights.size();
  STD_TORCH_CHECK((count == 1 || count == 3) && (in_biases.empty() || in_biases.size() == count),
                  "encoder_layer: expected 1 or 3 input projections, got ", count, " with ",
                  in_biases.size(), " biases");
  for (const Tensor& weight : in_weights)
    STD_TORCH_CHECK(weight.size(0) == (count == 1 ? 3 * d : d),
                    "encoder_layer: an input projection has ", weight.size(0), " rows");
  STD_TORCH_CHECK(activation >= Activation::None && activation <= Activation::Silu,
                  "encoder_layer: there is no activation ", int64_t(activation));
}

}  // namespace llmos
