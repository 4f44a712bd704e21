// The encoder layer op: attention, the feed-forward block and both norms in one call, without
// gradients.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../../encoder_layer.h"
#include "attention_inputs.h"
#include "linear_inputs.h"
#include "norm_common.h"

namespace llmos {
namespace {

// A linear layer, checked.
struct Linear {
  Operand weight;
  Optional bias, panels;
  int64_t outer, inner;

  Linear(const Tensor& weight_, const Optional& bias_, const Optional& panels_, ScalarType dtype,
         int64_t inner_)
      : weight(weight_), panels(panels_), outer(weight_.size(0)), inner(inner_) {
    STD_TORCH_CHECK(weight_.size(1) == inner, "encoder_layer: expected a weight of ", inner,
                    " columns, got ", weight_.size(1));
    STD_TORCH_CHECK(weight_.scalar_type() == dtype && (!bias_ || bias_->scalar_type() == dtype),
                    "encoder_layer: weights and biases must have the dtype of src, ", int(dtype));
    if (!bias_) return;
    STD_TORCH_CHECK(bias_->numel() == outer, "encoder_layer: expected a bias of ", outer,
                    " elements, got ", bias_->numel());
    bias = llmos::contiguous(*bias_);
  }

  // Return the panels of the weight, or null.
  template <class T>
  const void* panels_of() const {
    if (!panels) return nullptr;
    const int64_t bytes = panel_bytes<T>.best()(inner, outer);
    STD_TORCH_CHECK(panels->scalar_type() == ScalarType::Byte && panels->is_contiguous() &&
                        panels->numel() == bytes,
                    "encoder_layer: expected ", bytes, " contiguous bytes of panels, got ",
                    panels->numel(), " elements");
    return data<uint8_t>(*panels);
  }

  // Compute out [rows][outer] from input [rows][inner].
  template <class T>
  void run(const T* input, T* out, int64_t rows, Activation activation = Activation::None) const {
    if (rows * outer == 0) return;
    const void* in_panels = panels_of<T>();
    run_linear<T>({{input, inner, 1},
                   weight.of<T>(),
                   bias ? data<T>(*bias) : nullptr,
                   out,
                   nullptr,
                   rows,
                   inner,
                   outer,
                   {activation, {}},
                   !in_panels && rows < kTransposedBelowRows,
                   in_panels});
  }
};

struct Norm {
  NormParameter weight, bias;
  int64_t d;
  float eps;

  Norm(const Optional& weight_, const Optional& bias_, int64_t d_, double eps_)
      : weight(weight_, d_), bias(bias_, d_), d(d_), eps(float(eps_)) {}

  // Compute y = LayerNorm(x), or h = residual + x and y = LayerNorm(h). h may be x or residual.
  template <class T>
  void run(const T* x, const T* residual, T* y, T* h, int64_t rows, float* stats) const {
    NormForwardArgs<T> args{.x = x,
                            .x_stride = d,
                            .weight = weight.data,
                            .bias = bias.data,
                            .y = y,
                            .mean = stats,
                            .rstd = stats + rows,
                            .d = d,
                            .eps = eps};
    args.residual = residual;
    args.residual_stride = d;
    args.h = h;
    run_norm(args, rows);
  }
};

// The parts of a layer whose input is [batch, length, d].
struct Layer {
  int64_t batch, length, d, heads;
  double scale;
  LayerMasks masks;
  std::vector<Linear> project;  // One layer for query, key and value together, or three.
  Linear project_out, first, second;
  Norm norm1, norm2;
  Activation activation;
  bool norm_first;

  int64_t rows() const { return batch * length; }

  // Compute the attention out [rows][d] of x [rows][d]. qkv [3 * rows * d] is scratch memory.
  template <class T>
  void attend(const T* x, T* qkv, T* out, float* stats) const {
    const bool together = project.size() == 1;
    for (size_t i = 0; i < project.size(); ++i)
      project[i].run(x, qkv + int64_t(i) * rows() * d, rows());
    const int64_t row_stride = together ? 3 * d : d, next = together ? d : rows() * d;
    const auto view = [&](const T* at) {
      return Heads<const T>{at, length * row_stride, d / heads, row_stride};
    };
    const auto& [mask, padding, cu_seqlens] = masks;
    const auto sequences = cu_seqlens
                               ? varlen_sequences(*cu_seqlens, *cu_seqlens, length, length, 0)
                               : batch_sequences(batch, length, length, padding, length);
    AttentionCommonArgs<T> a{};
    a.query = view(qkv);
    a.key = view(qkv + next);
    a.value = view(qkv + 2 * next);
    set_masks(a, mask, padding);
    a.sequences = sequences.data();
    a.heads = a.kv_heads = heads;
    a.q_total = length;
    for (const Sequence& s : sequences) a.k_longest = std::max(a.k_longest, s.k_len);
    a.dim = a.v_dim = d / heads;
    a.scale = float(scale);
    a.m = stats;
    a.inverse = stats + rows() * heads;
    run_attention<T>({a, {out, length * d, d / heads, d}}, sequences);
  }

  template <class T>
  void run(const Tensor& src, const Tensor& to) const {
    const int64_t hidden_size = first.outer;
    const auto buffer = [&](int64_t columns) {
      return output(src, {rows(), columns}, src.scalar_type());
    };
    const Tensor qkv_ = buffer(3 * d), attended_ = buffer(d), sum_ = buffer(d), normed_ = buffer(d),
                 hidden_ = buffer(hidden_size);
    T *qkv = mutable_data<T>(qkv_), *attended = mutable_data<T>(attended_),
      *sum = mutable_data<T>(sum_), *normed = mutable_data<T>(normed_),
      *hidden = mutable_data<T>(hidden_), *out = mutable_data<T>(to);
    const Floats stats = floats(2 * rows() * heads);
    const T* x = data<T>(src);

    const T* attended_input = x;
    if (norm_first) {
      norm1.run<T>(x, nullptr, normed, nullptr, rows(), stats.get());
      attended_input = normed;
    }
    attend(attended_input, qkv, attended, stats.get());
    project_out.run(attended, sum, rows());
    // From here on `sum` is src + attention, and `normed` the input of the feed-forward block.
    (norm_first ? norm2 : norm1).run<T>(sum, x, normed, sum, rows(), stats.get());
    first.run(normed, hidden, rows(), activation);
    if (!norm_first) {
      second.run(hidden, sum, rows());
      return norm2.run<T>(sum, normed, out, sum, rows(), stats.get());
    }
    second.run(hidden, out, rows());
    add_to<T>.best()(sum, out, rows() * d);
  }
};

Tensor encoder_layer(const Tensor& src, const Optional& mask, const Optional& padding,
                     const Optional& cu_seqlens, std::vector<Tensor> in_weights,
                     std::vector<Tensor> in_biases, const Tensor& out_weight,
                     const Optional& out_bias, const Optional& norm1_weight,
                     const Optional& norm1_bias, const Tensor& weight1, const Optional& bias1,
                     const Tensor& weight2, const Optional& bias2, const Optional& norm2_weight,
                     const Optional& norm2_bias, int64_t heads, double scale, int64_t activation,
                     bool norm_first, double eps1, double eps2, std::vector<Tensor> panels) {
  const LayerMasks masks{mask, padding, cu_seqlens};
  check_encoder_layer(src, masks, in_weights, in_biases, heads, Activation(activation));
  const int64_t batch = src.size(0), length = src.size(1), d = src.size(2);
  const ScalarType dtype = src.scalar_type();
  const size_t count = in_weights.size();
  STD_TORCH_CHECK(panels.empty() || panels.size() == count + 3, "encoder_layer: expected ",
                  count + 3, " weights in panels, got ", panels.size());
  const auto panels_of = [&](size_t i) { return panels.empty() ? Optional{} : panels[i]; };
  std::vector<Linear> project;
  for (size_t i = 0; i < count; ++i) {
    const Optional bias = in_biases.empty() ? Optional{} : in_biases[i];
    project.emplace_back(in_weights[i], bias, panels_of(i), dtype, d);
  }
  const Layer layer{batch,
                    length,
                    d,
                    heads,
                    scale,
                    masks,
                    std::move(project),
                    Linear(out_weight, out_bias, panels_of(count), dtype, d),
                    Linear(weight1, bias1, panels_of(count + 1), dtype, d),
                    Linear(weight2, bias2, panels_of(count + 2), dtype, weight1.size(0)),
                    Norm(norm1_weight, norm1_bias, d, eps1),
                    Norm(norm2_weight, norm2_bias, d, eps2),
                    Activation(activation),
                    norm_first};
  STD_TORCH_CHECK(layer.project_out.outer == d && layer.second.outer == d,
                  "encoder_layer: the output projections have ", layer.project_out.outer, " and ",
                  layer.second.outer, " rows, expected ", d);
  const Tensor out = output_like(src);
  if (out.numel()) for_dtype(dtype, [&](auto t) { layer.run<decltype(t)>(src, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) { m.impl("encoder_layer", TORCH_BOX(&encoder_layer)); }

}  // namespace llmos
