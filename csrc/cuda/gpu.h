// SPDX-License-Identifier: Apache-2.0
// A GPU as a device of ops.h and layer_ops.h. Results come from torch's allocator, kernels run on torch's current
// stream, and nothing waits for them.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../layer_ops.h"
#include "launchers.h"

#ifndef AEVB_EMULATE
// Absent in a torch without CUDA, into which this module loads all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace aevb::cuda {
namespace {

#ifdef AEVB_EMULATE

class Place {
 public:
  explicit Place(const Tensor&) {}
  void* stream() const { return nullptr; }
  int32_t type() const { return aoti_torch_device_type_cpu(); }
  int32_t index() const { return 0; }
  int size() const { return multiprocessors(0); }
};

#else

// The tensor's GPU, which is current during this object's life, and its current stream.
class Place {
 public:
  explicit Place(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("aevb: this PyTorch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  void* stream() const { return stream_; }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
  int32_t index() const { return index_; }

  // The GPU's number of multiprocessors, asked for once.
  int size() const {
    static std::atomic<int> known[64];
    const auto at = static_cast<size_t>(index_);
    int count = at < std::size(known) ? known[at].load(std::memory_order_relaxed) : 0;
    if (!count) {
      count = multiprocessors(index_);
      if (at < std::size(known)) known[at].store(count, std::memory_order_relaxed);
    }
    return std::max(count, 1);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

class Gpu {
 public:
  explicit Gpu(const Tensor& t) : place_(t) {}

  Tensor empty(const Sizes& sizes, ScalarType dtype) {
    const Sizes strides = contiguous_strides(sizes);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    dtype_code(dtype), place_.type(), place_.index(), &handle));
    return Tensor(handle);
  }

  void gaussian(const GaussianArgs& a) {
    const Scratch scratch(*this, gaussian_scratch(a, place_.size()));
    check(cuda::gaussian(a, place_.size(), scratch.data(), place_.stream()));
  }
  void gaussian_backward(const GaussianArgs& a) { check(cuda::gaussian_backward(a, place_.stream())); }
  void gaussian_log_ratio(const GaussianArgs& a) {
    const Scratch scratch(*this, gaussian_log_ratio_scratch(a, place_.size()));
    check(cuda::gaussian_log_ratio(a, place_.size(), scratch.data(), place_.stream()));
  }
  void gaussian_log_ratio_backward(const GaussianArgs& a) {
    check(cuda::gaussian_log_ratio_backward(a, place_.stream()));
  }
  void likelihood(const LikelihoodArgs& a) {
    const Scratch scratch(*this, likelihood_scratch(a, place_.size()));
    check(cuda::likelihood(a, place_.size(), scratch.data(), place_.stream()));
  }
  void loss(const LossArgs& a) {
    const Scratch scratch(*this, loss_scratch(a));
    check(cuda::loss(a, scratch.data(), place_.stream()));
  }
  void scale(const ScaleArgs& a) { check(cuda::scale(a, place_.stream())); }
  void normal(const NormalArgs& a) { check(cuda::normal(a, place_.stream())); }
  void mix_seed(const MixSeedArgs& a) { check(cuda::mix_seed(a, place_.stream())); }
  void binarize(const BinarizeArgs& a) { check(cuda::binarize(a, place_.stream())); }
  void elementary(const ElementaryArgs& a) { check(cuda::elementary(a, place_.stream())); }
  void activation(const ActivationArgs& a) {
    add_pieces({a.out, 1, 0, a.D, a.rows, a.D, 1.0f, a.bias, a.activation, a.out});
  }
  void activation_backward(const ActivationArgs& a) {
    const Scratch scratch(*this, activation_scratch(a));
    check(cuda::activation_backward(a, scratch.data(), place_.stream()));
  }
  void add_pieces(const PiecesArgs& a) { check(cuda::add_pieces(a, place_.stream())); }
  void split_bfloat16(const SplitArgs& a) { check(cuda::split_bfloat16(a, place_.stream())); }
  void terms(const TermsArgs& a) { check(cuda::terms(a, place_.stream())); }
  void adam(AdamArgs& a) { check(cuda::adam(a, place_.stream())); }

 private:
  // Memory for the duration of an op. The allocator reuses it only for later work on the same stream.
  class Scratch {
   public:
    Scratch(Gpu& gpu, int64_t floats) {
      if (floats) tensor_ = gpu.empty({floats}, ScalarType::Float);
    }
    float* data() const { return tensor_ ? const_cast<Tensor&>(*tensor_).mutable_data_ptr<float>() : nullptr; }

   private:
    OptionalTensor tensor_;
  };

  static void check(const char* error) {
    if (error) throw std::runtime_error(std::string("aevb: CUDA reports an error: ") + error);
  }

  Place place_;
};

}  // namespace
}  // namespace aevb::cuda
