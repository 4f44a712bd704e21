// The backward of LayerNorm and RMSNorm. The gradients of weight and bias are summed over rows in
// an order that depends on the shape alone.
#include "norm.h"

#include <tuple>

namespace llmos {
namespace {

constexpr int64_t kWidestBackward = kHeld * kMaxThreads;
// At most so many groups of threads share the rows, and leave as many sums.
constexpr int64_t kMaxGroups = 512;
// Threads that add the sums of one column.
constexpr int kAdders = 8;

template <class T, class W>
struct BackwardArgs {
  const T* dy;
  const T* dh;  // Null: zeros.
  const T* h;
  int64_t dy_stride, dh_stride, h_stride;
  const W* weight;
  const float* mean;  // Null: RMSNorm.
  const float* rstd;
  T* dresidual;
  T* dx;           // Null: no dropout, so that dx equals dresidual.
  float* partial;  // [groups][2][d], or null where no gradient of weight and bias is wanted.
  int64_t rows, d, groups;
  Dropout dropout;
};

// Compute the rows of a group, and its sums for the gradients of weight and bias. A row of packs is
// held in registers, and so are the sums; one of single elements is read again for the second pass,
// and its sums are in memory, for their addresses alone would take the registers.
template <class T, class W, int kPack>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(BackwardArgs<T, W> a) {
  constexpr bool kIsHeld = kPack > 1;
  constexpr int kPacks = kIsHeld ? kHeld / kPack : 1;
  const int64_t group = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int step = int(blockDim.x) * kPack, first = int(threadIdx.x) * kPack, d = int(a.d);
  const Mask mask(a.dropout);
  float* const partial = a.partial ? a.partial + group * 2 * a.d : nullptr;
  float dweight[kPacks][kPack] = {}, dbias[kPacks][kPack] = {};

  // Call body(k, at) for each pack of a row, the k-th of those that are held.
  const auto each = [&](auto body) {
    if constexpr (kIsHeld) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (first + k * step < d) body(k, first + k * step);
    } else {
      for (int at = first; at < d; at += step) body(0, at);
    }
  };
  for (int64_t row = group; row < a.rows; row += a.groups) {
    const float mean = a.mean ? load_global<float>(a.mean + row) : 0;
    const float rstd = load_global<float>(a.rstd + row);
    float g[kPacks][kPack], x_hat[kPacks][kPack], sums[2] = {};
    const auto read = [&](int k, int at) {
      load(a.dy + row * a.dy_stride + at, g[k]);
      load(a.h + row * a.h_stride + at, x_hat[k]);
#pragma unroll
      for (int i = 0; i < kPack; ++i) x_hat[k][i] = (x_hat[k][i] - mean) * rstd;
    };
    const auto scale = [&](int k, int at) {
      if (!a.weight) return;
      float w[kPack];
      load(a.weight + at, w);
#pragma unroll
      for (int i = 0; i < kPack; ++i) g[k][i] *= w[i];
    };
    each([&](int k, int at) {
      read(k, at);
      if constexpr (!kIsHeld) {
        if (partial && row != group) {
          dweight[0][0] = load_global<float>(partial + at);
          dbias[0][0] = load_global<float>(partial + d + at);
        }
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        dweight[k][i] += g[k][i] * x_hat[k][i];
        dbias[k][i] += g[k][i];
      }
      if constexpr (!kIsHeld) {
        if (partial) {
          store_global(partial + at, dweight[0][0]);
          store_global(partial + d + at, dbias[0][0]);
        }
        dweight[0][0] = dbias[0][0] = 0;
      }
      scale(k, at);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums[0] += g[k][i];
        sums[1] += g[k][i] * x_hat[k][i];
      }
    });
    sum_over_row(sums);
    const float mean_g = a.mean ? sums[0] / float(d) : 0, mean_gx = sums[1] / float(d);
    each([&](int k, int at) {
      if constexpr (!kIsHeld) {
        read(k, at);
        scale(k, at);
      }
      float v[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = (g[k][i] - mean_g - x_hat[k][i] * mean_gx) * rstd;
      if (a.dh) {
        float dh[kPack];
        load(a.dh + row * a.dh_stride + at, dh);
#pragma unroll
        for (int i = 0; i < kPack; ++i) v[i] += dh[i];
      }
      store_rounded(a.dresidual + row * a.d + at, v);
      if (!a.dx) return;
      mask.apply(row, at, v);
      store_rounded(a.dx + row * a.d + at, v);
    });
  }
  if (!kIsHeld || !partial || group >= a.groups) return;
  each([&](int k, int at) {
    store_rounded(partial + at, dweight[k]);
    store_rounded(partial + d + at, dbias[k]);
  });
}

template <class W>
struct SumArgs {
  const float* partial;  // [groups][2][d]
  W* dweight;            // [d], or null where it is not wanted.
  W* dbias;
  int64_t d, groups;
};

// Add the sums of all groups: a warp has 32 columns of one of both gradients, kAdders warps a
// block.
template <class W>
__global__ void sum_groups_kernel(SumArgs<W> a) {
  __shared__ Shared<float, kAdders * kWarp> sums;
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  W* to = blockIdx.y ? a.dbias : a.dweight;
  const float* partial = a.partial + blockIdx.y * a.d + column;
  float sum = 0;
  if (to && column < a.d)
    for (int64_t group = threadIdx.y; group < a.groups; group += kAdders)
      sum += load_global<float>(partial + group * 2 * a.d);
  sums[int(threadIdx.y) * kWarp + int(threadIdx.x)] = sum;
  __syncthreads();
  if (threadIdx.y || !to || column >= a.d) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kAdders; ++i) sum += sums[i * kWarp + int(threadIdx.x)];
  store_global(to + column, W(sum));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_, const Optional& dh_,
                                                    const Tensor& h_, const Optional& weight_,
                                                    const Tensor& stats_, int64_t d, bool center,
                                                    double dropout_p, const Optional& seed,
                                                    bool weight_grad, bool bias_grad) {
  STD_TORCH_CHECK(d <= kWidestBackward, "layer_norm: the backward takes rows of at most ",
                  kWidestBackward, " elements, got ", d);
  const ScalarType dtype = weight_ ? weight_->scalar_type() : ScalarType::Float;
  const bool drops = dropout_p > 0, partials = weight_grad || bias_grad;
  const int64_t rows = d ? h_.numel() / d : 0;
  Tensor dresidual = output_like(h_);
  Tensor dx = drops ? output_like(h_) : output(h_, {0}, h_.scalar_type());
  Tensor dweight = output(h_, {weight_grad ? d : 0}, dtype);
  Tensor dbias = output(h_, {bias_grad ? d : 0}, dtype);
  STD_TORCH_CHECK(dy_.numel() == h_.numel() && dy_.scalar_type() == h_.scalar_type(),
                  "layer_norm: the incoming gradient must have the shape and dtype of the output");
  const RowView dy(dy_, d), dh(dh_ ? *dh_ : dy_, d), h(h_, d);
  const NormParameter weight(weight_, d);
  const Tensor stats = llmos::contiguous(stats_);
  const int64_t groups = std::min(rows, kMaxGroups);
  const Tensor partial = output(h_, {partials ? groups * 2 * d : 0}, ScalarType::Float);
  const Device device(h_);

  for_dtypes(h_.scalar_type(), weight_, {}, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const float* mean = data<float>(stats);
    const BackwardArgs<T, W> args{
        .dy = data<T>(*dy.tensor),
        .dh = dh_ ? data<T>(*dh.tensor) : nullptr,
        .h = data<T>(*h.tensor),
        .dy_stride = dy.stride,
        .dh_stride = dh.stride,
        .h_stride = h.stride,
        .weight = weight.of<W>(),
        .mean = center ? mean : nullptr,
        .rstd = center ? mean + rows : mean,
        .dresidual = mutable_data<T>(dresidual),
        .dx = drops ? mutable_data<T>(dx) : nullptr,
        .partial = partials ? mutable_data<float>(partial) : nullptr,
        .rows = rows,
        .d = d,
        .groups = groups,
        .dropout = dropout_of(dropout_p, seed),
    };
    constexpr int kPack = kWidest / int(sizeof(T));
    const int64_t bytes = sizeof(T);
    const bool is_wide = is_aligned(
        {args.dy, args.dh, args.h, args.weight, args.dresidual, args.dx, args.partial},
        {d * bytes, args.dy_stride * bytes, args.dh_stride * bytes, args.h_stride * bytes});
    const RowGrid grid(groups, d, kPreferred);
    if (rows && is_wide)
      device.launch(norm_backward_kernel<T, W, kPack>, grid.grid, grid.block, args);
    else if (rows)
      device.launch(norm_backward_kernel<T, W, 1>, grid.grid, grid.block, args);
  });
  if (partials && d) {
    for_dtype(dtype, [&](auto w) {
      using W = decltype(w);
      const SumArgs<W> args{mutable_data<float>(partial),
                            weight_grad ? mutable_data<W>(dweight) : nullptr,
                            bias_grad ? mutable_data<W>(dbias) : nullptr, d, groups};
      device.launch(sum_groups_kernel<W>, dim3(unsigned(divided_up(d, kWarp)), 2),
                    dim3(kWarp, kAdders), args);
    });
  }
  return {dresidual, dx, dweight, dbias};
}

Choice choose_layer_norm_backward("layer_norm_backward", kFewRows, 5, kWidestBackward);

}  // namespace

LLMOS_CUDA_OPS(m) { own<choose_layer_norm_backward, &backward>(m); }

}  // namespace llmos
