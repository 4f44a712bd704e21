// llmos_kernel_table(): lists which instruction set (ISA) has which kernel, for tests.
#include <string>

#include "../attention.h"
#include "../embedding.h"
#include "../int8.h"
#include "../layer_norm.h"
#include "../linear.h"
#include "../peak.h"

namespace llmos {
namespace {

struct Listing {
  std::string text;

  template <class Fn>
  void add(const char* kernel, const char* dtype, const IsaTable<Fn>& table) {
    text.append(kernel).append(" ").append(dtype);
    for (int isa = 0; isa < kIsaCount; ++isa)
      if (table.by_isa[isa]) text.append(" ").append(isa_names[isa]);
    text.append("\n");
  }
};

template <class T>
void add_dtype(Listing& to, const char* dtype) {
  to.add("linear_forward", dtype, task_kernel<LinearForwardArgs<T>>);
  to.add("linear_panels", dtype, task_kernel<LinearPanelsArgs<T>>);
  to.add("panel_bytes", dtype, panel_bytes<T>);
  to.add("linear_gemv", dtype, task_kernel<LinearGemvArgs<T>>);
  to.add("linear_sparse_gemv", dtype, task_kernel<LinearSparseGemvArgs<T>>);
  to.add("linear_dinput", dtype, task_kernel<LinearDinputArgs<T>>);
  to.add("linear_dweight", dtype, task_kernel<LinearDweightArgs<T>>);
  to.add("activation", dtype, task_kernel<ActivationArgs<T>>);
  to.add("int8_quantize", dtype, task_kernel<Int8QuantizeArgs<T>>);
  to.add("int8_gemm", dtype, task_kernel<Int8GemmArgs<T>>);
  to.add("int8_gemv", dtype, task_kernel<Int8GemvArgs<T>>);
  to.add("int8_weight_only", dtype, task_kernel<Int8WeightOnlyArgs<T>>);
  to.add("attention_forward", dtype, task_kernel<AttentionForwardArgs<T>>);
  to.add("attention_combine", dtype, combine_splits<T>);
  to.add("attention_weights", dtype, task_kernel<AttentionWeightsArgs<T>>);
  to.add("attention_backward", dtype, task_kernel<AttentionBackwardArgs<T>>);
  to.add("attention_mask_backward", dtype, task_kernel<AttentionMaskBackwardArgs<T>>);
  to.add("norm_forward", dtype, norm_forward<T>);
  to.add("norm_backward", dtype, norm_backward<T>);
  to.add("sum_partials", dtype, sum_partials<T>);
  to.add("to_float", dtype, to_float<T>);
  to.add("add_to", dtype, add_to<T>);
  to.add("sum_embeddings", dtype, sum_embeddings<T>);
  to.add("drop_rows", dtype, drop_rows<T>);
}

}  // namespace

// Return a line for each kernel: its name, its element type, and the ISAs with a build of its own.
extern "C" [[gnu::visibility("default")]] const char* llmos_kernel_table() {
  static const std::string table = [] {
    Listing listing;
    add_dtype<float>(listing, "float32");
    add_dtype<bf16>(listing, "bfloat16");
    add_dtype<f16>(listing, "float16");
    listing.add("multiply_adds", "float32", multiply_adds<float>);
    listing.add("multiply_adds", "bfloat16", multiply_adds<bf16>);
    listing.add("multiply_adds", "int8", multiply_adds<int8_t>);
    listing.add("int8_vnni_weight", "int8", task_kernel<Int8VnniWeightArgs>);
    listing.add("int8_zero_point", "int8", task_kernel<Int8ZeroPointArgs>);
    return listing.text;
  }();
  return table.c_str();
}

}  // namespace llmos
