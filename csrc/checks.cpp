// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include "formulas/likelihoods.h"

namespace aevb {
namespace {

bool is_supported_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

void check_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  if (is_supported_float(dtype)) return;
  fail(op, name, " has dtype ", dtype_text(dtype), "; expected float32, bfloat16 or float16",
       dtype == ScalarType::Double ? " (aevb.reference has the same function for float64)" : "");
}

void check_targets(const char* op, const char* output_name, const Tensor& output, const Tensor& x,
                   std::optional<double> x_scale) {
  check_float(op, output_name, output);
  check_same_device(op, output_name, output, "x", x);
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Byte) {
    if (!x_scale)
      fail(op,
           "x is uint8 and x_scale is not given, so an image could be taken for bits; pass x_scale=1/255 for pixels "
           "in 0..255, or x_scale=1 for {0, 1}");
  } else if (dtype != ScalarType::Bool && !is_supported_float(dtype)) {
    fail(op, "x has dtype ", dtype_text(dtype), "; expected float32, bfloat16, float16, bool, or uint8 with x_scale");
  }
}

int64_t product(const Sizes& sizes, size_t first, size_t last) {
  int64_t n = 1;
  for (size_t i = first; i < last; ++i) n *= sizes[i];
  return n;
}

}  // namespace

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

std::string shape_text(const Tensor& t) { return shape_text(sizes_of(t)); }

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "number " + std::to_string(static_cast<int>(dtype));
  }
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

void check_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  if (a.is_cpu() == b.is_cpu() && (a.is_cpu() || a.get_device_index() == b.get_device_index())) return;
  fail(op, a_name, " is on ", device_text(a), " but ", b_name, " is on ", device_text(b),
       "; move them to the same device");
}

LatentShape check_latents(const char* op, const Tensor& mu, const Tensor& logvar) {
  check_float(op, "mu", mu);
  if (mu.scalar_type() != logvar.scalar_type())
    fail(op, "mu is ", dtype_text(mu.scalar_type()), " but logvar is ", dtype_text(logvar.scalar_type()),
         "; they must have the same dtype");
  check_same_device(op, "mu", mu, "logvar", logvar);
  Sizes sizes = sizes_of(mu);
  if (sizes != sizes_of(logvar))
    fail(op, "mu has shape ", shape_text(mu), " but logvar has shape ", shape_text(logvar), "; they must be equal");
  if (sizes.empty()) fail(op, "mu has shape (); expected (..., D), the latent dimensions last");
  const int64_t D = sizes.back();
  sizes.pop_back();
  return {product(sizes, 0, sizes.size()), D, sizes};
}

bool check_prior(const char* op, const Tensor& mu, const Prior& prior) {
  if (prior.logvar_min.has_value() != prior.logvar_max.has_value() ||
      (prior.logvar_min && !(*prior.logvar_min <= *prior.logvar_max)))
    fail(op, "logvar's range must have a least and a greatest logvar, in this order");
  if (prior.mu.has_value() != prior.logvar.has_value()) fail(op, "a prior has both a mu and a logvar, or neither");
  if (!prior.mu) return false;
  const auto check = [&](const char* name, const Tensor& t) {
    check_same_device(op, "mu", mu, name, t);
    if (t.scalar_type() != ScalarType::Float)
      fail(op, name, " has dtype ", dtype_text(t.scalar_type()), "; expected float32");
    const Sizes sizes = sizes_of(t);
    if (sizes != sizes_of(mu) && sizes != Sizes{sizes_of(mu).back()})
      fail(op, name, " has shape ", shape_text(t), " but mu has shape ", shape_text(mu),
           "; expected mu's shape, or (D,) for all rows");
  };
  check("prior_mu", *prior.mu);
  check("prior_logvar", *prior.logvar);
  return true;
}

SampleShape check_samples(const char* op, const Tensor& mu, const Tensor& seed, std::optional<int64_t> num_samples) {
  if (num_samples && *num_samples < 0) fail(op, "num_samples is ", *num_samples, "; expected 0 or more, or None");
  SampleShape s{num_samples.value_or(1), 1, sizes_of(mu)};
  if (num_samples) s.z.insert(s.z.begin(), *num_samples);
  if (seed.scalar_type() != ScalarType::Long)
    fail(op, "seed has dtype ", dtype_text(seed.scalar_type()), "; expected an int or an int64 tensor");
  check_same_device(op, "mu", mu, "seed", seed);
  const Sizes prefix = sizes_of(seed);
  const bool fits = prefix.size() < s.z.size() && std::equal(prefix.begin(), prefix.end(), s.z.begin());
  if (!fits)
    fail(op, "seed has shape ", shape_text(seed), "; expected () or the first dimensions of z, which has shape ",
         shape_text(s.z), ", without the last");
  s.seed_block = product(s.z, prefix.size(), s.z.size());
  return s;
}

namespace {

// Names of a likelihood and of its parameters.
struct Names {
  const char* name;
  bool has_scalar;
  std::vector<const char*> params;
};
const Names& names_of(Likelihood likelihood) {
#define AEVB_NAMES(name, Struct, ...) Names{#name, kHasScalar<Struct>, {__VA_ARGS__}},
  static const Names all[] = {AEVB_LIKELIHOODS(AEVB_NAMES)};
#undef AEVB_NAMES
  return all[static_cast<int>(likelihood)];
}

}  // namespace

Likelihood likelihood_named(const char* op, const std::string& name) {
#define AEVB_LIKELIHOOD_OF(of, ...) \
  if (name == #of) return Likelihood::of;
  AEVB_LIKELIHOODS(AEVB_LIKELIHOOD_OF)
#undef AEVB_LIKELIHOOD_OF
  std::string known;
#define AEVB_ADD(of, ...) known += known.empty() ? #of : ", " #of;
  AEVB_LIKELIHOODS(AEVB_ADD)
#undef AEVB_ADD
  fail(op, "likelihood is '", name, "'; expected one of ", known);
}

Likelihood likelihood_of_recon(const char* op, const std::string& name) {
  const Likelihood likelihood = likelihood_named(op, name);
  const size_t params = names_of(likelihood).params.size();
  if (params != 1 || names_of(likelihood).has_scalar)
    fail(op, "likelihood ", name, " has ", params, params == 1 ? " parameter and a number of its own" : " parameters",
         "; expected one of which recon is all that there is");
  return likelihood;
}

// weight: one for each element of x; offset: one for each row of x.
static void check_weights(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& offset) {
  if (weight) {
    const ScalarType dtype = weight->scalar_type();
    if (dtype != ScalarType::Bool && dtype != ScalarType::Byte && !is_supported_float(dtype))
      fail(op, "weight has dtype ", dtype_text(dtype),
           "; expected bool or uint8, which select elements of x, or float32, bfloat16 or float16, which weigh them");
    check_same_device(op, "x", x, "weight", *weight);
    if (sizes_of(*weight) != sizes_of(x))
      fail(op, "weight has shape ", shape_text(*weight), " and x has shape ", shape_text(x),
           "; expected x's shape, or one that broadcasts to it");
  }
  if (!offset) return;
  if (offset->scalar_type() != ScalarType::Float)
    fail(op, "offset has dtype ", dtype_text(offset->scalar_type()), "; expected float32");
  check_same_device(op, "x", x, "offset", *offset);
  Sizes rows = sizes_of(x);
  rows.pop_back();
  if (sizes_of(*offset) != rows)
    fail(op, "offset has shape ", shape_text(*offset), " and x has shape ", shape_text(x),
         "; expected one number for each datapoint, ", shape_text(rows));
}

LikelihoodShape check_likelihood(const char* op, Likelihood likelihood, const Tensor& p0, const Tensor& x,
                                 const OptionalTensor& p1, std::optional<double> x_scale, const OptionalTensor& weight,
                                 const OptionalTensor& offset) {
  const Names& names = names_of(likelihood);
  if ((names.params.size() > 1) != p1.has_value())
    fail(op, names.name, " has ", names.params.size(), " parameters, and ", p1 ? 2 : 1, " are given");
  const char* name = names.params[0];
  check_targets(op, name, p0, x, x_scale);
  const Sizes out = sizes_of(p0), target = sizes_of(x);
  const bool fits = !target.empty() && target.size() <= out.size() &&
                    std::equal(target.begin(), target.end(), out.end() - static_cast<int64_t>(target.size()));
  if (!fits)
    fail(op, name, " has shape ", shape_text(p0), " and x has shape ", shape_text(x),
         "; expected x of shape (..., D) and ", name,
         " of the same shape, or with extra leading dimensions of samples");
  if (p1) {
    check_float(op, names.params[1], *p1);
    check_same_device(op, name, p0, names.params[1], *p1);
    if (sizes_of(*p1) != out)
      fail(op, name, " has shape ", shape_text(p0), " and ", names.params[1], " has shape ", shape_text(*p1),
           "; expected a ", names.params[1], " of the same shape, or one that broadcasts to it, as (D,) and () do");
  }
  check_weights(op, x, weight, offset);
  const Sizes rows(out.begin(), out.end() - 1);
  return {product(rows, 0, rows.size()), product(target, 0, target.size() - 1), out.back(), rows};
}

LikelihoodShape check_reconstruction(const char* op, const Tensor& recon, const Tensor& x, const Sizes& batch,
                                     const char* batch_from, std::optional<double> x_scale) {
  check_targets(op, "recon", recon, x, x_scale);
  const Sizes out = sizes_of(recon), target = sizes_of(x);
  const auto begins_with_batch = [&](const Sizes& sizes, size_t first) {
    return sizes.size() >= first + batch.size() && std::equal(batch.begin(), batch.end(), sizes.begin() + first);
  };
  if (!begins_with_batch(target, 0))
    fail(op, "x has shape ", shape_text(x), ", but ", batch_from, " makes the batch ", shape_text(batch),
         "; expected x of shape (*batch, *datapoint)");
  const int64_t B = product(batch, 0, batch.size()), D = product(target, batch.size(), target.size());
  for (size_t samples = 0; samples + batch.size() <= out.size(); ++samples) {
    if (begins_with_batch(out, samples) && product(out, samples + batch.size(), out.size()) == D)
      return {product(out, 0, samples) * B, B, D, Sizes(out.begin(), out.begin() + samples + batch.size())};
  }
  fail(op, "recon has shape ", shape_text(recon), "; with batch ", shape_text(batch), " (from ", batch_from,
       ") and x of shape ", shape_text(x), ", expected (*samples, *batch, *datapoint) with ", D,
       " elements in a datapoint");
}

void check_grad(const char* op, const char* name, const Tensor& grad, const Sizes& shape, ScalarType dtype,
                const Tensor& like) {
  if (grad.scalar_type() != dtype)
    fail(op, name, " has dtype ", dtype_text(grad.scalar_type()), "; expected ", dtype_text(dtype));
  if (sizes_of(grad) != shape) fail(op, name, " has shape ", shape_text(grad), "; expected ", shape_text(shape));
  check_same_device(op, name, grad, "the input", like);
}

Reduction check_reduction(const char* op, int64_t reduction) {
  if (reduction < 0 || reduction > 2) fail(op, "reduction is ", reduction, "; expected 0 (none), 1 (mean) or 2 (sum)");
  return static_cast<Reduction>(reduction);
}

void check_gradient(const char* op, int64_t gradient) {
  if (gradient < 0 || gradient > 2)
    fail(op, "gradient is ", gradient, "; expected 0 (total), 1 (path) or 2 (doubly reparameterized)");
}

void check_beta(const char* op, const OptionalTensor& beta, const Tensor& like) {
  if (!beta) return;
  if (beta->dim() != 0 || beta->scalar_type() != ScalarType::Float)
    fail(op, "beta has shape ", shape_text(*beta), " and dtype ", dtype_text(beta->scalar_type()),
         "; expected a number or a 0-d float32 tensor");
  check_same_device(op, "beta", *beta, "recon", like);
}

}  // namespace aevb
