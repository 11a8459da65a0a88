// What the interior-point method knows of the cone: here the nonnegative orthant. A second cone adds its versions.
#pragma once
#include "simd.hpp"

namespace diffopt {

// Side of a row, in equilibrated units, beyond which it counts less at the start.
constexpr double FAR = 1e6;

INLINE Vec far_weight(Vec side) {
    const Vec v = vmax(vabs(side) * (1 / FAR), splat(1.0));
    return v * v;
}

// The shift that brings a vector with this smallest entry and largest magnitude into the interior.
// Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", section 5.3.
template <class Number> INLINE Number interior_shift(Number lowest, Number largest) {
    return select(lowest > 1e-3 * (1.0 + largest), Number{}, 1.0 - lowest);
}

// Rows so far away would set mu alone; their multipliers start small.
INLINE Vec far_multiplier(Vec s, Vec z) { return select(s > FAR, vmin(z, FAR / s), z); }

// s/z, the ratio by which a row takes part in a Newton step.
INLINE Vec row_ratio(Vec s, Vec z) { return s / z; }

// Largest step that keeps v + alpha dv >= 0.
INLINE Vec reach(Vec v, Vec dv) { return select(dv < 0.0, -v / dv, splat(INF)); }

}  // namespace diffopt
