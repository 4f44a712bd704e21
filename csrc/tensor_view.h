// RowView: a tensor of any shape and strides seen as rows of d elements; and output(): allocation
// of result tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <optional>

namespace llmos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Call body(T{}) with the element type of dtype; BFloat16 and Half are those of the kernels.
template <class BFloat16, class Half, class Body>
void for_dtype_of(ScalarType dtype, Body body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  STD_TORCH_CHECK(false, "no kernel for dtype ", int(dtype));
}

// Raise an error unless seed is the two int64 of a dropout mask: the Philox seed and offset.
inline void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(
      seed.numel() == 2 && seed.scalar_type() == ScalarType::Long && seed.is_contiguous(),
      "seed must be 2 contiguous int64, got ", seed.numel(), " elements");
}

constexpr int64_t kMaxDims = 64;  // The same limit as in torch.

// Return the stride between rows of d elements, or -1 if no single stride describes them.
inline int64_t row_stride(const Tensor& t, int64_t d) {
  int64_t inner = 1, rows = 1, stride = d;
  for (int64_t dim = t.dim() - 1; dim >= 0; --dim) {
    const int64_t size = t.size(dim), step = t.stride(dim);
    if (size == 1) continue;
    if (inner < d) {
      if (step != inner) return -1;
      inner *= size;
    } else if (rows == 1) {
      stride = step;
      rows = size;
    } else {
      if (step != stride * rows) return -1;
      rows *= size;
    }
  }
  return stride;
}

inline Tensor contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Rows of d contiguous elements at a fixed stride. Copies the tensor only if no single stride
// describes it.
struct RowView {
  const Tensor* tensor;
  std::optional<Tensor> copy;
  int64_t stride;

  RowView(const Tensor& t, int64_t d) : tensor(&t), stride(d) {
    if (t.is_contiguous()) return;
    stride = row_stride(t, d);
    if (stride >= 0) return;
    tensor = &copy.emplace(torch::stable::contiguous(t));
    stride = d;
  }
  RowView(const RowView&) = delete;
};

// Tests set LLMOS_DISPATCHED_OUTPUTS=1 to see every allocation, and to poison or guard it.
inline const bool dispatched_outputs = std::getenv("LLMOS_DISPATCHED_OUTPUTS") != nullptr;

// Return an uninitialised contiguous tensor on the device of `like`. The C shim takes a third of
// the time of torch::stable::new_empty, which looks up its op by name at every call.
template <class Sizes>
Tensor output(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const int64_t* size = std::data(sizes);
  const int64_t dims = int64_t(std::size(sizes));
  if (dispatched_outputs) return torch::stable::new_empty(like, {size, size_t(dims)}, dtype);
  int64_t strides[kMaxDims], step = 1;
  STD_TORCH_CHECK(dims <= kMaxDims, "at most ", kMaxDims, " dimensions, got ", dims);
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(size[i], 1);
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, size, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor output_like(const Tensor& like) {
  return output(like, like.sizes(), like.scalar_type());
}

inline Tensor output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return output<std::initializer_list<int64_t>>(like, sizes, dtype);
}

}  // namespace llmos
