// A whole encoder layer at inference: norms by the kernels here, products and attention by other
// ops through the dispatcher, with no Python between them. llmos_kernels/ops/_encoder_layer.py has
// the formulas.
//
// Products are torch's (cuBLAS). Attention without a mask is torch's, too; with one it is Triton's
// launcher, which is Python: torch's own gives NaN, not 0, to a query that sees no key.
#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "../encoder_layer.h"
#include "activations.h"
#include "choice.h"

namespace llmos {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Call an op with `results` results, at most as many as arguments, and return these.
template <size_t kResults = 1, class... Args>
std::array<Tensor, kResults> call(const char* name, const Args&... args) {
  static_assert(kResults <= sizeof...(Args));
  std::array<StableIValue, sizeof...(Args)> stack{from(args)...};
  check_call(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
  std::array<Tensor, kResults> results;
  for (size_t i = 0; i < kResults; ++i) results[i] = to<Tensor>(stack[i]);
  return results;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  return call("aten::linear", x, weight, bias)[0];
}

Tensor activated(const Tensor& z, Activation activation) {
  const auto gelu = [&](const char* how) { return call("aten::gelu", z, std::string(how))[0]; };
  switch (activation) {
    case Activation::Relu:
      return call("aten::relu", z)[0];
    case Activation::Relu2:
      return call("aten::square", call("aten::relu", z)[0])[0];
    case Activation::Gelu:
      return gelu("none");
    case Activation::GeluTanh:
      return gelu("tanh");
    case Activation::Silu:
      return call("aten::silu", z)[0];
    case Activation::None:
      break;
  }
  return z;
}

// How many layers' attention was torch's and Triton's.
std::atomic<int64_t> attention_calls[2];

struct Norm {
  const Optional& weight;
  const Optional& bias;
  double eps;
  int64_t d;

  Tensor of(const Tensor& x) const {
    return call<2>(LLMOS_NAMESPACE "::layer_norm_forward", x, weight, bias, d, eps, true)[0];
  }
  // Return the norm of h = residual + x, and h.
  std::array<Tensor, 3> of_sum(const Tensor& x, const Tensor& residual) const {
    return call<3>(LLMOS_NAMESPACE "::add_layer_norm_forward", x, residual, weight, bias, d, eps,
                   true, 0.0, Optional{});
  }
};

// Return the attention of x [batch, length, d] before its output projection.
Tensor attend(const Tensor& x, const LayerMasks& masks, const std::vector<Tensor>& weights,
              const std::vector<Tensor>& biases, int64_t heads, double scale) {
  const int64_t batch = x.size(0), length = x.size(1), d = x.size(2);
  const auto of_heads = [&](const Tensor& rows) {
    const int64_t sizes[] = {batch, length, heads, d / heads};
    return torch::stable::transpose(torch::stable::view(rows, {sizes, 4}), 1, 2);
  };
  std::array<Tensor, 3> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor made = linear(x, weights[i], biases.empty() ? Optional{} : biases[i]);
    if (weights.size() == 3) {
      parts[i] = of_heads(made);
      continue;
    }
    const int64_t sizes[] = {batch, length, 3, heads, d / heads};
    const Tensor together = torch::stable::view(made, {sizes, 5});
    for (int64_t k = 0; k < 3; ++k)
      parts[size_t(k)] = torch::stable::transpose(torch::stable::select(together, 2, k), 1, 2);
  }
  const auto& [query, key, value] = parts;
  const auto by_torch = [&] {
    const Tensor out = call("aten::scaled_dot_product_attention", query, key, value, Optional{},
                            0.0, false, std::optional<double>(scale), false)[0];
    return torch::stable::transpose(out, 1, 2);
  };
  const auto& [mask, padding, cu_seqlens] = masks;
  const bool is_masked = bool(masks);
  ++attention_calls[is_masked];
  // Ours is [batch, length, heads, d / heads].
  const Tensor out =
      is_masked ? call<2>("llmos::attention_forward", query, key, value, mask, padding, cu_seqlens,
                          cu_seqlens, Optional{}, scale, int64_t(0), 0.0, 0.0, Optional{})[0]
                : by_torch();
  const int64_t sizes[] = {batch, length, d};
  return torch::stable::reshape(out, {sizes, 3});
}

Tensor encoder_layer(const Tensor& src, const Optional& mask, const Optional& padding,
                     const Optional& cu_seqlens, std::vector<Tensor> in_weights,
                     std::vector<Tensor> in_biases, const Tensor& out_weight,
                     const Optional& out_bias, const Optional& norm1_weight,
                     const Optional& norm1_bias, const Tensor& weight1, const Optional& bias1,
                     const Tensor& weight2, const Optional& bias2, const Optional& norm2_weight,
                     const Optional& norm2_bias, int64_t heads, double scale, int64_t activation,
                     bool norm_first, double eps1, double eps2, std::vector<Tensor>) {
  const LayerMasks masks{mask, padding, cu_seqlens};
  check_encoder_layer(src, masks, in_weights, in_biases, heads, Activation(activation));
  const int64_t d = src.size(2);
  if (src.numel() == 0) return output_like(src);
  const Norm norm1{norm1_weight, norm1_bias, eps1, d}, norm2{norm2_weight, norm2_bias, eps2, d};
  const auto attention = [&](const Tensor& x) {
    return linear(attend(x, masks, in_weights, in_biases, heads, scale), out_weight, out_bias);
  };
  const auto feed_forward = [&](const Tensor& x) {
    return linear(activated(linear(x, weight1, bias1), Activation(activation)), weight2, bias2);
  };
  if (norm_first) {
    const auto [y, x, stats] = norm2.of_sum(attention(norm1.of(src)), src);
    return torch::stable::subtract(x, feed_forward(y), -1.0);  // The stable ABI has no add.
  }
  const Tensor x = norm1.of_sum(attention(src), src)[0];
  return norm2.of_sum(feed_forward(x), x)[0];
}

}  // namespace

LLMOS_CUDA_OPS(m) { m.impl("encoder_layer", TORCH_BOX(&encoder_layer)); }

}  // namespace llmos

extern "C" {

// Write how many calls of the encoder layer have left attention to torch and to Triton's launcher.
[[gnu::visibility("default")]] void llmos_cuda_attention_calls(int64_t* calls) {
  for (int i = 0; i < 2; ++i) calls[i] = llmos::attention_calls[i];
}
}
