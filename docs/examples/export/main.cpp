// Runs the package that package.py wrote, without Python, and compares the result with Python's.
//
//     main FOLDER
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<std::string> lines(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) found.push_back(line);
  return found;
}

torch::Tensor tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::pickle_load(bytes).toTensor();
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: main FOLDER");
  const std::string folder = std::string(argv[1]) + "/";
  // In Python llmos_kernels declares its ops; here nobody does. The library brings the kernels.
  torch::Library ops(torch::Library::DEF, "llmos", {}, __FILE__, __LINE__);
  for (const std::string& schema : lines(folder + "schemas.txt")) ops.def(schema.c_str());
  for (const std::string& path : lines(folder + "libraries.txt"))
    if (!dlopen(path.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());

  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(folder + "model.pt2");
  const std::vector<torch::Tensor> inputs = {tensor(folder + "ids.pt"), tensor(folder + "mask.pt")};
  const torch::Tensor expected = tensor(folder + "expected.pt");
  const torch::Tensor result = model.run(inputs).at(0);
  const double error = (result - expected).abs().max().item<double>();

  const auto start = std::chrono::steady_clock::now();
  constexpr int kRuns = 10;
  for (int i = 0; i < kRuns; ++i) model.run(inputs);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  std::cout << "result " << result.sizes() << ", largest difference to Python " << error << ", "
            << time.count() / kRuns << " ms\n";
  return error < 1e-4 ? 0 : 1;
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 2;
}
