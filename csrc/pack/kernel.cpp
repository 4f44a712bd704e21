#include "kernel.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace llmos::pack {
namespace {

constexpr size_t kMostParameters = 96, kMostMatrices = 4, kMostDimensions = 5;

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

void append(std::string& to, int64_t number) {
  char text[24];
  to.append(text, std::snprintf(text, sizeof text, "%lld", static_cast<long long>(number)));
}

// The numbers in a list or tuple; false, without an error, for anything else.
template <class T>
bool numbers(PyObject* of, PyObject* name, T* to, size_t& count) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(of, name));
  if (!found || !(PyList_Check(found.ptr()) || PyTuple_Check(found.ptr())))
    return PyErr_Clear(), false;
  count = PySequence_Fast_GET_SIZE(found.ptr());
  if (count > kMostDimensions) return false;
  for (size_t i = 0; i < count; ++i) {
    const long long number = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(found.ptr(), i));
    if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    to[i] = static_cast<T>(number);
  }
  return true;
}

// Throws std::invalid_argument for memory that the GPU cannot read, as of a tensor on the CPU.
void check_pointer(uint64_t address, const char* symbol) {
  uint64_t device_address = 0;
  if (!address) return;
  const Result result = driver().pointer_get_attribute(&device_address, kDevicePointer, address);
  if (result == kInvalidValue)
    throw std::invalid_argument(std::string(symbol) + ": a tensor that is not on the GPU");
  check(result, "cuPointerGetAttribute", symbol);
}

// A TensorDescriptor of Triton's: a matrix, and the blocks that are read of it.
struct Matrix {
  uint64_t address;
  size_t rank;
  uint64_t shape[kMostDimensions], strides[kMostDimensions];
};

// Its tensor map, as Triton makes it.
void encode(const Descriptor& about, const Matrix& matrix, std::byte* map, const char* symbol) {
  const auto& d = driver();
  if (!d.tensor_map_encode_tiled) throw Unusable("the CUDA driver has no cuTensorMapEncodeTiled");
  const size_t rank = matrix.rank;
  if (about.block.size() != rank) throw Unusable("a tensor descriptor of another rank");
  // Innermost first, the steps in bytes, without the innermost.
  uint64_t sizes[kMostDimensions], steps[kMostDimensions];
  uint32_t block[kMostDimensions], every[kMostDimensions];
  for (size_t i = 0; i < rank; ++i) {
    sizes[i] = matrix.shape[rank - 1 - i];
    block[i] = about.block[rank - 1 - i];
    every[i] = 1;
    if (i + 1 < rank) steps[i] = matrix.strides[rank - 2 - i] * about.element_bytes;
  }
  check_pointer(matrix.address, symbol);
  check(d.tensor_map_encode_tiled(map, about.element_type, rank,
                                  reinterpret_cast<void*>(matrix.address), sizes, steps, block,
                                  every, 0, about.swizzle, kL2Promotion128, 0),
        "cuTensorMapEncodeTiled", symbol);
  // Drivers to 13.1 set a bit too many for small matrices (NVIDIA/cutlass, commit b7ecaa6).
  int version = 0;
  check(d.get_version(&version), "cuDriverGetVersion", symbol);
  uint64_t last = (sizes[0] - 1) * about.element_bytes;
  for (size_t i = 1; i < rank; ++i) last += (sizes[i] - 1) * steps[i - 1];
  if (version <= 13010 && last + 1 < 128 * 1024) {
    uint64_t word;
    std::memcpy(&word, map + sizeof word, sizeof word);
    word &= ~(uint64_t{1} << 21);
    std::memcpy(map + sizeof word, &word, sizeof word);
  }
}

}  // namespace

// What a launch passes: the key that names its variant, and the values in order.
struct Kernel::Arguments {
  struct Value {
    uint64_t bits;
    size_t size;  // In bytes.
    enum { Number, Pointer, Matrix } kind;
  };
  std::string key;
  std::array<Value, kMostParameters> values;
  size_t count = 0;
  std::array<Matrix, kMostMatrices> matrices;  // In the order of their values.
  size_t matrix_count = 0;

  void push(uint64_t bits, size_t size, decltype(Value::kind) kind = Value::Number) {
    if (count == kMostParameters) throw std::runtime_error("too many parameters");
    values[count++] = {bits, size, kind};
  }
};

Kernel::Kernel(std::vector<std::pair<std::string, int>> parameters,
               std::vector<std::string> options, py::dict dtypes)
    : dtypes_(std::move(dtypes)) {
  const auto name = [](const std::string& s) {
    return py::reinterpret_steal<py::str>(interned(s.c_str()));
  };
  for (auto& [text, specialize] : parameters) parameters_.push_back({name(text), specialize});
  for (auto& text : options) options_.push_back({name(text), 0});
}

void Kernel::add(const std::string& key, Variant variant) {
  variants_.insert_or_assign(key, std::move(variant));
}

bool Kernel::read(const py::tuple& args, const py::dict& kwargs, Arguments& to) const {
  static PyObject *const data_ptr = interned("data_ptr"), *const dtype = interned("dtype"),
                         *const base = interned("base"), *const shape = interned("shape"),
                         *const strides = interned("strides"), *const padding = interned("padding"),
                         *const block_shape = interned("block_shape");
  const size_t positional = args.size();
  size_t named = 0;
  auto& key = to.key;
  key.reserve(512);

  const auto dtype_name = [&](PyObject* tensor) -> PyObject* {
    py::object its = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, dtype));
    PyObject* name = its ? PyDict_GetItemWithError(dtypes_.ptr(), its.ptr()) : nullptr;
    if (!name) PyErr_Clear();
    return name;  // Borrowed of dtypes_.
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
      if (!name || !PyUnicode_Check(filled.ptr()) || to.matrix_count == kMostMatrices ||
          PyUnicode_CompareWithASCIIString(filled.ptr(), "zero"))
        return false;
      Matrix& matrix = to.matrices[to.matrix_count++];
      int64_t block[kMostDimensions];
      size_t steps = 0, sizes = 0;
      if (!numbers(value, shape, matrix.shape, matrix.rank) ||
          !numbers(value, strides, matrix.strides, steps) ||
          !numbers(value, block_shape, block, sizes) || steps != matrix.rank ||
          sizes != matrix.rank)
        return false;
      matrix.address = address(tensor.ptr());
      key += "tensordesc<";
      append_text(name);
      for (size_t j = 0; j < sizes; ++j) {
        key += j ? ", " : "[";
        append(key, block[j]);
      }
      key += "]>";
      to.push(0, kTensorMapBytes, Arguments::Value::Matrix);
      for (size_t j = 0; j < matrix.rank; ++j) to.push(matrix.shape[j], 4);
      for (size_t j = 0; j < matrix.rank; ++j) to.push(matrix.strides[j], 8);
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
  // Hidden: global scratch and profile scratch, of which no packed kernel takes any.
  to.push(0, 8);
  to.push(0, 8);
  return positional <= parameters_.size() && named == kwargs.size();
}

py::object Kernel::key(const py::tuple& args, const py::dict& kwargs) const {
  Arguments arguments;
  if (!read(args, kwargs, arguments)) return py::none();
  return py::str(arguments.key);
}

namespace {

// While a stream of this thread captures a graph: what is done here does not belong to it.
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

Handle Kernel::function(Variant& variant, int device) {
  const auto loaded = [&]() -> Handle {
    return size_t(device) < variant.functions.size() ? variant.functions[device] : nullptr;
  };
  {
    const std::lock_guard lock(loading_);
    if (Handle function = loaded()) return function;
  }
  // Python may let another thread run meanwhile: no lock is held.
  const auto image = variant.image().cast<std::string>();
  // Whoever holds the lock does not wait for Python.
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

bool Kernel::launch(int device, uint64_t stream, const py::tuple& grid, const py::tuple& args,
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
  if (!context) {  // A thread that has not used CUDA yet.
    int ordinal = 0;
    check(d.device_get(&ordinal, device), "cuDeviceGet", symbol);
    check(d.primary_context_retain(&context, ordinal), "cuDevicePrimaryCtxRetain", symbol);
    check(d.context_set_current(context), "cuCtxSetCurrent", symbol);
  }
  Handle loaded = function(variant, device);

  alignas(64) std::byte maps[kMostMatrices][kTensorMapBytes];
  std::array<void*, kMostParameters> pointers;
  size_t matrices = 0;
  bool same = arguments.count == variant.sizes.size() &&
              arguments.matrix_count == variant.descriptors.size();
  for (size_t i = 0; same && i < arguments.count; ++i) {
    auto& value = arguments.values[i];
    same = value.size == variant.sizes[i];
    pointers[i] = &value.bits;
    if (value.kind == Arguments::Value::Pointer) check_pointer(value.bits, symbol);
    if (!same || value.kind != Arguments::Value::Matrix) continue;
    encode(variant.descriptors[matrices], arguments.matrices[matrices], maps[matrices], symbol);
    pointers[i] = maps[matrices++];
  }
  if (!same) throw Unusable(std::string(symbol) + " has other parameters than its arguments");
  // It waits where the GPU's queue is full, maybe for what another thread of Python has to do.
  const py::gil_scoped_release without_python;
  check(d.launch_kernel(loaded, blocks[0], blocks[1], blocks[2], variant.threads, 1, 1,
                        variant.shared, reinterpret_cast<Handle>(stream), pointers.data(), nullptr),
        "cuLaunchKernel", symbol);
  return true;
}

}  // namespace llmos::pack
