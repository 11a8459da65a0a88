// What the interior-point method knows of the cone: here the nonnegative orthant. A second cone adds its versions.
#pragma once
#include "simd.hpp"

namespace diffopt {

// Side of a row, in equilibrated units, beyond which it counts less at the start.
constexpr double FAR = 1e6;

template <class Vec> INLINE Vec far_weight(Vec side) {
    const Vec v = vmax(vabs(side) * (1 / FAR), Vec{} + 1.0);
    return v * v;
}

// The shift that brings a vector with this smallest entry and largest magnitude into the interior.
// Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", section 5.3.
template <class Number> INLINE Number interior_shift(Number lowest, Number largest) {
    return select(lowest > 1e-3 * (1.0 + largest), Number{}, 1.0 - lowest);
}

// What a side counts for where violations are measured against the sizes of the constraints: nothing where the value meets
// it, for a far side would hide what the others miss.
template <class Vec> INLINE Vec crossed_side(Vec value, Vec side) { return select(value > side, vabs(side), Vec{}); }

// Rows so far away would set mu alone; their multipliers start small.
template <class Vec> INLINE Vec far_multiplier(Vec s, Vec z) { return select(s > FAR, vmin(z, FAR / s), z); }

}  // namespace diffopt
