// SPDX-License-Identifier: Apache-2.0
// The launchers, without torch: nvcc never sees a torch header, and g++ never sees a kernel. A launcher puts its work
// on the stream, does not wait for the GPU, and returns null or CUDA's error message.
#pragma once
#include "../args.h"

namespace aevb::cuda {

// Floats of scratch memory that a launcher needs, for the sums of parts of rows: 0 where no row is cut.
int64_t gaussian_scratch(const GaussianArgs& a, int multiprocessors);
int64_t gaussian_log_ratio_scratch(const GaussianArgs& a, int multiprocessors);
int64_t likelihood_scratch(const LikelihoodArgs& a, int multiprocessors);
int64_t loss_scratch(const LossArgs& a);
int64_t activation_scratch(const ActivationArgs& a);

const char* gaussian(const GaussianArgs& a, int multiprocessors, float* scratch, void* stream);
const char* gaussian_backward(const GaussianArgs& a, void* stream);
const char* gaussian_log_ratio(const GaussianArgs& a, int multiprocessors, float* scratch, void* stream);
const char* gaussian_log_ratio_backward(const GaussianArgs& a, void* stream);
const char* likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream);
const char* loss(const LossArgs& a, float* scratch, void* stream);
const char* scale(const ScaleArgs& a, void* stream);
const char* normal(const NormalArgs& a, void* stream);
const char* mix_seed(const MixSeedArgs& a, void* stream);
const char* binarize(const BinarizeArgs& a, void* stream);
const char* elementary(const ElementaryArgs& a, void* stream);
const char* add_pieces(const PiecesArgs& a, void* stream);
const char* activation_backward(const ActivationArgs& a, float* scratch, void* stream);
const char* split_bfloat16(const SplitArgs& a, void* stream);
const char* terms(const TermsArgs& a, void* stream);
const char* adam(AdamArgs& a, void* stream);

// out[row] = factor * the sum of partial[row], [rows, parts], whose elements are nodes of the row's tree of sums.
const char* join(const float* partial, int64_t rows, int64_t parts, float factor, float* out, void* stream);

// Number of multiprocessors of a GPU, which says how much work fills it; 0 if the GPU does not answer.
int multiprocessors(int device);

}  // namespace aevb::cuda
