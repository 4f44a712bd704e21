// Keys, tensor maps and launches of Triton kernels that were compiled ahead of time.
#include "kernel.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace llmos::pack {
namespace {

constexpr size_t kMaxParameters = 96, kMaxDescriptors = 4, kMaxDimensions = 5;

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

void append(std::string& to, int64_t number) {
  char text[24];
  to.append(text, std::snprintf(text, sizeof text, "%lld", static_cast<long long>(number)));
}

// Read the integers of a list or tuple attribute. Returns false, without a Python error, for any
// other value.
template <class T>
bool numbers(PyObject* of, PyObject* name, T* to, size_t& count) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(of, name));
  if (!found || !(PyList_Check(found.ptr()) || PyTuple_Check(found.ptr())))
    return PyErr_Clear(), false;
  count = PySequence_Fast_GET_SIZE(found.ptr());
  if (count > kMaxDimensions) return false;
  for (size_t i = 0; i < count; ++i) {
    const long long number = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(found.ptr(), i));
    if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    to[i] = static_cast<T>(number);
  }
  return true;
}

// Throw std::invalid_argument for memory that the GPU cannot read, as that of a CPU tensor.
void check_pointer(uint64_t address, const char* symbol) {
  uint64_t device_address = 0;
  if (!address) return;
  const Result result = driver().pointer_get_attribute(&device_address, kDevicePointer, address);
  if (result == kInvalidValue)
    throw std::invalid_argument(std::string(symbol) + ": a tensor that is not on the GPU");
  check(result, "cuPointerGetAttribute", symbol);
}

// A call's argument of Triton's type TensorDescriptor.
struct TensorDescriptor {
  uint64_t address;
  size_t rank;
  uint64_t shape[kMaxDimensions], strides[kMaxDimensions];
};

// Encode the CUDA tensor map of a tensor descriptor, in the way that Triton does.
void encode(const Descriptor& compiled, const TensorDescriptor& descriptor, std::byte* map,
            const char* symbol) {
  const auto& d = driver();
  if (!d.tensor_map_encode_tiled) throw Unusable("the CUDA driver has no cuTensorMapEncodeTiled");
  const size_t rank = descriptor.rank;
  if (compiled.block.size() != rank) throw Unusable("a tensor descriptor of another rank");
  // Innermost dimension first. Strides are in bytes; the innermost has none.
  uint64_t sizes[kMaxDimensions], steps[kMaxDimensions];
  uint32_t block[kMaxDimensions], element_strides[kMaxDimensions];
  for (size_t i = 0; i < rank; ++i) {
    sizes[i] = descriptor.shape[rank - 1 - i];
    block[i] = compiled.block[rank - 1 - i];
    element_strides[i] = 1;
    if (i + 1 < rank) steps[i] = descriptor.strides[rank - 2 - i] * compiled.element_bytes;
  }
  check_pointer(descriptor.address, symbol);
  check(d.tensor_map_encode_tiled(map, compiled.element_type, rank,
                                  reinterpret_cast<void*>(descriptor.address), sizes, steps, block,
                                  element_strides, 0, compiled.swizzle, kL2Promotion128, 0),
        "cuTensorMapEncodeTiled", symbol);
  // Drivers up to 13.1 set a wrong bit for small tensors (NVIDIA/cutlass, commit b7ecaa6).
  int version = 0;
  check(d.get_version(&version), "cuDriverGetVersion", symbol);
  uint64_t last = (sizes[0] - 1) * compiled.element_bytes;
  for (size_t i = 1; i < rank; ++i) last += (sizes[i] - 1) * steps[i - 1];
  if (version <= 13010 && last + 1 < 128 * 1024) {
    uint64_t word;
    std::memcpy(&word, map + sizeof word, sizeof word);
    word &= ~(uint64_t{1} << 21);
    std::memcpy(map + sizeof word, &word, sizeof word);
  }
}

}  // namespace

// The arguments of a launch: the key of its variant, and the values in order.
struct PackedKernel::Arguments {
  struct Value {
    uint64_t bits;
    size_t size;  // In bytes.
    enum { Number, Pointer, TensorDescriptor } kind;
  };
  std::string key;
  std::array<Value, kMaxParameters> values;
  size_t count = 0;
  std::array<TensorDescriptor, kMaxDescriptors> descriptors;  // In the order of their values.
  size_t descriptor_count = 0;

  void push(uint64_t bits, size_t size, decltype(Value::kind) kind = Value::Number) {
    if (count == kMaxParameters) throw std::runtime_error("too many parameters");
    values[count++] = {bits, size, kind};
  }
};

PackedKernel::PackedKernel(std::vector<std::pair<std::string, int>> parameters,
                           std::vector<std::string> options, py::dict dtypes)
    : dtypes_(std::move(dtypes)) {
  const auto name = [](const std::string& s) {
    return py::reinterpret_steal<py::str>(interned(s.c_str()));
  };
  for (auto& [text, specialize] : parameters) parameters_.push_back({name(text), specialize});
  for (auto& text : options) options_.push_back({name(text), 0});
}

void PackedKernel::add(const std::string& key, Variant variant) {
  variants_.insert_or_assign(key, std::move(variant));
}

bool PackedKernel::read(const py::tuple& args, const py::dict& kwargs, Arguments& to) const {
  static PyObject *const data_ptr = interned("data_ptr"), *const dtype = interned("dtype"),
                         *const base = interned("base"), *const shape = interned("shape"),
                         *const strides = interned("strides"), *const padding = interned("padding"),
                         *const block_shape = interned("block_shape");
  const size_t positional = args.size();
  size_t named = 0;
  auto& key = to.key;
  key.reserve(512);

  const auto dtype_name = [&](PyObject* tensor) -> PyObject* {
    py::object found = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, dtype));
    PyObject* name = found ? PyDict_GetItemWithError(dtypes_.ptr(), found.ptr()) : nullptr;
    if (!name) PyErr_Clear();
    return name;  // A reference borrowed from dtypes_.
  };
  const auto address = [&](PyObject* tensor) {
    const auto at = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
    if (!at) throw py::error_already_set();
    const uint64_t number = PyLong_AsUnsignedLongLong(at.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return number;
  };
  const auto append_text = [&](PyObject* text) {
    Py_ssize_t length = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text, &length);
    key.append(data, length);
  };

  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& parameter = parameters_[i];
    PyObject* value;
    if (i < positional) {
      value = PyTuple_GET_ITEM(args.ptr(), i);
    } else {
      value = PyDict_GetItemWithError(kwargs.ptr(), parameter.name.ptr());
      if (!value) return PyErr_Clear(), false;
      ++named;
    }
    if (i) key += ',';
    if (parameter.specialize & kConstexpr) {
      key += '=';
      if (PyLong_CheckExact(value)) {
        int overflow = 0;
        append(key, PyLong_AsLongLongAndOverflow(value, &overflow));
        if (overflow) return false;
      } else {
        py::object text = py::reinterpret_steal<py::object>(PyObject_Repr(value));
        if (!text) throw py::error_already_set();
        append_text(text.ptr());
      }
    } else if (value == Py_None) {
      key += '-';
    } else if (PyLong_CheckExact(value)) {
      int overflow = 0;
      const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow) return false;
      if ((parameter.specialize & kValue) && number == 1) {
        key += '1';
        continue;
      }
      const bool narrow = number >= INT32_MIN && number <= INT32_MAX;
      key += narrow ? "i32" : "i64";
      if ((parameter.specialize & kAlignment) && number % 16 == 0) key += '!';
      to.push(static_cast<uint64_t>(number), narrow ? 4 : 8);
    } else if (PyFloat_CheckExact(value)) {
      key += "fp32";
      const float number = static_cast<float>(PyFloat_AS_DOUBLE(value));
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      to.push(bits, 4);
    } else if (PyObject* name = dtype_name(value)) {
      const uint64_t at = address(value);
      key += '*';
      append_text(name);
      if ((parameter.specialize & kAlignment) && at % 16 == 0) key += '!';
      to.push(at, 8, Arguments::Value::Pointer);
    } else {
      const auto tensor = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, base));
      const auto filled = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, padding));
      if (!tensor || !filled) return PyErr_Clear(), false;
      name = dtype_name(tensor.ptr());
      if (!name || !PyUnicode_Check(filled.ptr()) || to.descriptor_count == kMaxDescriptors ||
          PyUnicode_CompareWithASCIIString(filled.ptr(), "zero"))
        return false;
      TensorDescriptor& descriptor = to.descriptors[to.descriptor_count++];
      int64_t block[kMaxDimensions];
      size_t steps = 0, sizes = 0;
      if (!numbers(value, shape, descriptor.shape, descriptor.rank) ||
          !numbers(value, strides, descriptor.strides, steps) ||
          !numbers(value, block_shape, block, sizes) || steps != descriptor.rank ||
          sizes != descriptor.rank)
        return false;
      descriptor.address = address(tensor.ptr());
      key += "tensordesc<";
      append_text(name);
      for (size_t j = 0; j < sizes; ++j) {
        key += j ? ", " : "[";
        append(key, block[j]);
      }
      key += "]>";
      to.push(0, kTensorMapBytes, Arguments::Value::TensorDescriptor);
      for (size_t j = 0; j < descriptor.rank; ++j) to.push(descriptor.shape[j], 4);
      for (size_t j = 0; j < descriptor.rank; ++j) to.push(descriptor.strides[j], 8);
    }
  }
  for (const auto& option : options_) {
    PyObject* value = PyDict_GetItemWithError(kwargs.ptr(), option.name.ptr());
    if (!value) continue;
    ++named;
    if (value == Py_None) continue;
    if (!PyLong_CheckExact(value)) return false;
    key += ';';
    append_text(option.name.ptr());
    key += '=';
    append(key, PyLong_AsLongLong(value));
  }
  // Two hidden parameters: global scratch and profile scratch, which no kernel of the pack uses.
  to.push(0, 8);
  to.push(0, 8);
  return positional <= parameters_.size() && named == kwargs.size();
}

py::object PackedKernel::key(const py::tuple& args, const py::dict& kwargs) const {
  Arguments arguments;
  if (!read(args, kwargs, arguments)) return py::none();
  return py::str(arguments.key);
}

namespace {

// Allows calls that a graph capture on this thread would forbid; they do not become part of it.
class Uncaptured {
 public:
  explicit Uncaptured(const char* symbol) {
    check(driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode", symbol);
  }
  ~Uncaptured() { driver().exchange_capture_mode(&mode_); }

 private:
  int mode_ = kCaptureRelaxed;
};

Handle load(const Variant& variant, const std::string& image) {
  const auto& d = driver();
  const char* symbol = variant.symbol.c_str();
  const Uncaptured uncaptured(symbol);
  Handle module = nullptr, function = nullptr;
  check(d.module_load_data(&module, image.data()), "cuModuleLoadData", symbol);
  check(d.module_get_function(&function, module, symbol), "cuModuleGetFunction", symbol);
  if (variant.shared > 48 * 1024) {
    check(d.function_set_attribute(function, kMaxDynamicShared, static_cast<int>(variant.shared)),
          "cuFuncSetAttribute", symbol);
  }
  if (d.function_get_param_info) {
    size_t count = 0, offset = 0, size = 0;
    bool same = true;
    for (; same && d.function_get_param_info(function, count, &offset, &size) == kSuccess; ++count)
      same = count < variant.sizes.size() && variant.sizes[count] == size;
    if (!same || count != variant.sizes.size())
      throw std::runtime_error(std::string("the cubin of ") + symbol +
                               " has other parameters than its index says");
  }
  return function;
}

}  // namespace

Handle PackedKernel::function(Variant& variant, int device) {
  const auto loaded = [&]() -> Handle {
    return size_t(device) < variant.functions.size() ? variant.functions[device] : nullptr;
  };
  {
    const std::lock_guard lock(loading_);
    if (Handle function = loaded()) return function;
  }
  // Python may switch threads in here, so the lock is not held.
  const auto image = variant.image().cast<std::string>();
  // A thread that holds the lock never waits for the GIL: no deadlock.
  const py::gil_scoped_release without_python;
  const std::lock_guard lock(loading_);
  if (Handle function = loaded()) return function;
  Handle function = nullptr;
  try {
    function = load(variant, image);
  } catch (const std::runtime_error& e) {
    throw Unusable(e.what());
  }
  if (size_t(device) >= variant.functions.size()) variant.functions.resize(device + 1);
  return variant.functions[device] = function;
}

bool PackedKernel::launch(int device, uint64_t stream, const py::tuple& grid, const py::tuple& args,
                          const py::dict& kwargs) {
  Arguments arguments;
  if (!read(args, kwargs, arguments)) return false;
  const auto found = variants_.find(arguments.key);
  if (found == variants_.end()) return false;
  Variant& variant = found->second;

  unsigned blocks[3] = {1, 1, 1};
  if (grid.size() > 3) throw std::runtime_error("a grid has at most 3 dimensions");
  for (size_t i = 0; i < grid.size(); ++i) blocks[i] = grid[i].cast<unsigned>();
  if (!blocks[0] || !blocks[1] || !blocks[2]) return true;

  const auto& d = driver();
  const char* symbol = variant.symbol.c_str();
  Handle context = nullptr;
  check(d.context_get_current(&context), "cuCtxGetCurrent", symbol);
  if (!context) {  // This thread has not used CUDA yet.
    int ordinal = 0;
    check(d.device_get(&ordinal, device), "cuDeviceGet", symbol);
    check(d.primary_context_retain(&context, ordinal), "cuDevicePrimaryCtxRetain", symbol);
    check(d.context_set_current(context), "cuCtxSetCurrent", symbol);
  }
  Handle loaded = function(variant, device);

  alignas(64) std::byte maps[kMaxDescriptors][kTensorMapBytes];
  std::array<void*, kMaxParameters> pointers;
  size_t encoded = 0;
  bool same = arguments.count == variant.sizes.size() &&
              arguments.descriptor_count == variant.descriptors.size();
  for (size_t i = 0; same && i < arguments.count; ++i) {
    auto& value = arguments.values[i];
    same = value.size == variant.sizes[i];
    pointers[i] = &value.bits;
    if (value.kind == Arguments::Value::Pointer) check_pointer(value.bits, symbol);
    if (!same || value.kind != Arguments::Value::TensorDescriptor) continue;
    encode(variant.descriptors[encoded], arguments.descriptors[encoded], maps[encoded], symbol);
    pointers[i] = maps[encoded++];
  }
  if (!same) throw Unusable(std::string(symbol) + " has other parameters than its arguments");
  // The launch blocks while the GPU's queue is full; another Python thread may have to drain it.
  const py::gil_scoped_release without_python;
  check(d.launch_kernel(loaded, blocks[0], blocks[1], blocks[2], variant.threads, 1, 1,
                        variant.shared, reinterpret_cast<Handle>(stream), pointers.data(), nullptr),
        "cuLaunchKernel", symbol);
  return true;
}

}  // namespace llmos::pack
