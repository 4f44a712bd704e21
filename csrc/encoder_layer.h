// What the encoder layer op asks of its arguments, on CPUs and GPUs.
#pragma once

#include <vector>

#include "activation.h"
#include "tensor_view.h"

namespace llmos {

// What hides keys: an attn_mask that broadcasts to [batch, heads, length, length], padding [batch,
// length]; or where sequences begin whose tokens are one after the other in a batch of 1.
struct LayerMasks {
  const Optional &mask, &padding, &cu_seqlens;

  explicit operator bool() const { return mask || padding || cu_seqlens; }
};

// Raise an error unless the masks have these shapes.
inline void check_masks(const LayerMasks& masks, int64_t batch, int64_t heads, int64_t length) {
  const auto& [mask, padding, cu_seqlens] = masks;
  STD_TORCH_CHECK(
      !cu_seqlens ||
          (batch == 1 && !mask && !padding && cu_seqlens->scalar_type() == ScalarType::Int &&
           cu_seqlens->dim() == 1 && cu_seqlens->numel() > 1),
      "encoder_layer: cu_seqlens must be int32 [sequences + 1], without masks and with a "
      "batch of 1, got ",
      batch);
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
inline void check_encoder_layer(const Tensor& src, const LayerMasks& masks,
                                const std::vector<Tensor>& in_weights,
                                const std::vector<Tensor>& in_biases, int64_t heads,
                                Activation activation) {
  STD_TORCH_CHECK(src.dim() == 3 && src.is_contiguous(),
                  "encoder_layer: src must be contiguous [batch, length, d], got ", src.dim(),
                  " dimensions");
  const int64_t batch = src.size(0), length = src.size(1), d = src.size(2);
  STD_TORCH_CHECK(heads > 0 && d % heads == 0 && d / heads <= 256, "encoder_layer: ", heads,
                  " heads cannot share ", d, " features, at most 256 each");
  check_masks(masks, batch, heads, length);
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
