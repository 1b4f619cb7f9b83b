// SPDX-License-Identifier: Apache-2.0
// Division by a number known on the host: a multiplication and a shift, where the GPU would call a subroutine.
#pragma once
#include "platform.h"

namespace aevb::cuda {

// n / divisor for 0 <= n < 2^63 and 1 <= divisor < 2^63. With s = ceil(log2 divisor) and m = floor(2^(63+s) / divisor)
// + 1, the quotient is floor(m n / 2^(63+s)). For m exceeds 2^(63+s) / divisor by at most 1, so m n / 2^(63+s) exceeds
// n / divisor by less than 1 / divisor.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < static_cast<uint64_t>(divisor)) ++shift_;
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + shift_);
    multiplier_ = static_cast<uint64_t>(power / static_cast<uint64_t>(divisor)) + 1;
  }

  AEVB_DEVICE int64_t divide(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(multiplier_, static_cast<uint64_t>(n) << 1) >> shift_);
  }
  AEVB_DEVICE int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_;
  uint64_t multiplier_;
  unsigned shift_ = 0;
};

}  // namespace aevb::cuda
