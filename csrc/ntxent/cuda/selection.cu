// Which CUDA backend computes the loss: what was asked for, and what the GPU and the build can do.
#include "ntxent/cuda/selection.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "ntxent/cuda/sm90/sm90.h"
#include "ntxent/cuda/tensors.cuh"

namespace cellfast::ntxent::cuda {
namespace {

enum class Choice : int { kAuto, kPortable, kSm90a };

constexpr const char* kNames[] = {"auto", "portable", "sm90a"};

// GPUs (the names cudaGetDeviceProperties gives) on which the tests of the sm90a kernels passed and their speed was measured. "auto" takes those
// kernels on these GPUs alone. An entry belongs in one commit with its record under benchmarks/results/. The empty text ends the list.
constexpr const char* kVerified[] = {""};

Choice choice_of(const std::string& name, const char* source) {
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) {
      return static_cast<Choice>(i);
    }
  }
  fail(source, " must be auto, portable or sm90a, got '", name, "'");
}

std::atomic<int>& asked() {
  static std::atomic<int> choice{[] {
    const char* name = std::getenv("CELLFAST_NTXENT_CUDA");
    return static_cast<int>(name == nullptr || *name == '\0' ? Choice::kAuto : choice_of(name, "CELLFAST_NTXENT_CUDA"));
  }()};
  return choice;
}

bool is_verified(int device) {
  // Asking for the name takes longer than a small loss does: once per device.
  constexpr int kUnknown = 0, kNo = 1, kYes = 2;
  static std::array<std::atomic<int>, 64> answers{};
  const bool kept = device >= 0 && device < static_cast<int>(answers.size());
  if (kept && answers[device].load() != kUnknown) {
    return answers[device].load() == kYes;
  }
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  bool found = false;
  for (const char* name : kVerified) {
    found = found || (*name != '\0' && std::strcmp(name, properties.name) == 0);
  }
  if (kept) {
    answers[device].store(found ? kYes : kNo);
  }
  return found;
}

}  // namespace

bool use_sm90(const Tensor& zhat) {
  const auto choice = static_cast<Choice>(asked().load());
  if (choice == Choice::kPortable || (choice == Choice::kAuto && kVerified[0][0] == '\0')) {
    return false;
  }
  const std::string why = sm90::unsuitable(zhat);
  if (choice == Choice::kAuto) {
    return why.empty() && is_verified(zhat.get_device_index());
  }
  if (!why.empty()) {
    fail("the NT-Xent kernel sm90a was asked for and cannot serve z: ", why,
         ". Take CELLFAST_NTXENT_CUDA=portable (or torch.ops.cellfast.ntxent_cuda_kernel(\"portable\")) for this input.");
  }
  return true;
}

std::string choose_kernel(const std::string& name) {
  if (!name.empty()) {
    asked().store(static_cast<int>(choice_of(name, "the kernel")));
  }
  return kNames[asked().load()];
}

}  // namespace cellfast::ntxent::cuda
