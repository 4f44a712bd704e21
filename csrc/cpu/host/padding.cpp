// The ops that take the padding out of a batch, and put it back; llmos_kernels/ops/padding.py
// describes them. Rows are bytes here: any dtype.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "common.h"

namespace llmos {
namespace {

// Below so many bytes, starting threads costs more time than it saves.
constexpr int64_t kGrain = 1 << 17;

template <class Body>
void in_parallel(int64_t count, int64_t bytes, Body body) {
  if (count * bytes <= kGrain) return body(0, count);
  torch::stable::parallel_for(0, count, 1 + kGrain / std::max<int64_t>(bytes, 1), body);
}

// Write the indices of tokens, and where each sequence begins; return the numbers of tokens, of
// those of the longest sequence, of those beyond `size`, and of values that are neither 0 nor 1.
template <class T>
std::array<int64_t, 4> find_tokens(const T* mask, int64_t batch, int64_t length, int64_t size,
                                   int64_t* indices, int32_t* ends) {
  int64_t total = 0, longest = 0, wrong = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t before = total;
    ends[b] = int32_t(total);
    for (int64_t at = b * length; at < (b + 1) * length; ++at) {
      if (!mask[at]) continue;
      wrong += mask[at] != T(1);
      if (total < size) indices[total] = at;
      ++total;
    }
    longest = std::max(longest, total - before);
  }
  ends[batch] = int32_t(total);
  ends[batch + 1] = int32_t(size);
  std::fill(indices + std::min(total, size), indices + size, -1);
  return {total, longest, std::max<int64_t>(total - size, 0), wrong};
}

std::tuple<Tensor, Tensor, Tensor> unpad_indices(const Tensor& mask_, int64_t size) {
  STD_TORCH_CHECK(mask_.dim() == 2 && size >= 0 && mask_.numel() <= INT32_MAX,
                  "unpad_indices: expected a mask [batch, length]");
  const Tensor mask = llmos::contiguous(mask_);
  const int64_t batch = mask.size(0), length = mask.size(1);
  Tensor indices = output(mask, {size}, ScalarType::Long);
  Tensor ends = output(mask, {batch + 2}, ScalarType::Int);
  Tensor counts = output(mask, {4}, ScalarType::Long);
  const auto find = [&](auto t) {
    const auto found = find_tokens(data<decltype(t)>(mask), batch, length, size,
                                   mutable_data<int64_t>(indices), mutable_data<int32_t>(ends));
    std::copy(found.begin(), found.end(), mutable_data<int64_t>(counts));
  };
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      find(uint8_t{});
      break;
    case ScalarType::Char:
      find(int8_t{});
      break;
    case ScalarType::Short:
      find(int16_t{});
      break;
    case ScalarType::Int:
      find(int32_t{});
      break;
    case ScalarType::Long:
      find(int64_t{});
      break;
    default:
      STD_TORCH_CHECK(false, "mask must be bool or of integers, got ", int(mask.scalar_type()));
  }
  return {indices, ends, counts};
}

// Rows of bytes, with the indices of some of them.
struct Rows {
  RowView view;
  const char* from;
  const int64_t* index;
  int64_t count, bytes, stride;

  Rows(const Tensor& x, const Tensor& indices)
      : view(x, x.size(1)), index(data<int64_t>(indices)), count(indices.numel()) {
    STD_TORCH_CHECK(
        x.dim() == 2 && indices.scalar_type() == ScalarType::Long && indices.is_contiguous(),
        "expected rows [n, d] and contiguous int64 indices");
    from = static_cast<const char*>(view.tensor->const_data_ptr());
    bytes = x.size(1) * int64_t(x.element_size());
    stride = view.stride * int64_t(x.element_size());
  }
};

Tensor gather_rows(const Tensor& x, const Tensor& indices_) {
  const Tensor indices = llmos::contiguous(indices_);
  const Rows rows(x, indices);
  const int64_t limit = x.size(0);
  const auto* wrong =
      std::find_if(rows.index, rows.index + rows.count, [&](int64_t i) { return i >= limit; });
  STD_TORCH_CHECK(wrong == rows.index + rows.count, "index ", *wrong, " is out of range for ",
                  limit, " rows");
  Tensor out = output(x, {rows.count, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  in_parallel(rows.count, rows.bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (rows.index[i] < 0)
        std::memset(to + i * rows.bytes, 0, rows.bytes);
      else
        std::memcpy(to + i * rows.bytes, rows.from + rows.index[i] * rows.stride, rows.bytes);
    }
  });
  return out;
}

Tensor scatter_rows(const Tensor& x, const Tensor& indices_, int64_t out_rows) {
  const Tensor indices = llmos::contiguous(indices_);
  Rows rows(x, indices);
  STD_TORCH_CHECK(x.size(0) == rows.count && out_rows >= 0, "scatter_rows: expected ", x.size(0),
                  " indices, got ", rows.count);
  while (rows.count && rows.index[rows.count - 1] < 0) --rows.count;
  for (int64_t i = 0; i < rows.count; ++i)
    STD_TORCH_CHECK(rows.index[i] > (i ? rows.index[i - 1] : -1) && rows.index[i] < out_rows,
                    "indices must ascend from 0 to ", out_rows - 1, ", got ", rows.index[i]);
  Tensor out = output(x, {out_rows, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  // Each byte is written once.
  in_parallel(out_rows, rows.bytes, [&](int64_t begin, int64_t end) {
    const int64_t* next = std::lower_bound(rows.index, rows.index + rows.count, begin);
    for (int64_t row = begin; row < end; ++next) {
      const int64_t stop = next < rows.index + rows.count ? std::min(*next, end) : end;
      std::memset(to + row * rows.bytes, 0, (stop - row) * rows.bytes);
      row = stop + 1;
      if (stop < end)
        std::memcpy(to + stop * rows.bytes, rows.from + (next - rows.index) * rows.stride,
                    rows.bytes);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmos, CPU, m) {
  m.impl("unpad_indices", TORCH_BOX(&unpad_indices));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}

}  // namespace llmos
