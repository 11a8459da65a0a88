// What an interior-point step needs to know of the cone: here the nonnegative orthant, one row at a time.
// A second cone adds its own versions of these functions; the loop does not change.
#pragma once
#include "team.cuh"

namespace diffopt {
namespace cone {

constexpr double UNLIMITED = 1e300;

// The ratio e of a row in the Newton system: C dx - e dz = side.
__device__ inline double ratio(double s, double z) { return s / z; }

// The row's share of s'z.
__device__ inline double complementarity(double s, double z) { return s * z; }

// The side of a row of the Newton system, for its primal residual r and its target of s z.
__device__ inline double side(double r, double s, double z, double target) { return -r + s - target / z; }

// The change of s. Where s is small it is taken from complementarity, elsewhere from feasibility (the row moves by
// `move`): each is the one that keeps the relative accuracy of s.
__device__ inline double slack_step(double r, double s, double z, double target, double move, double dz) {
    return s < z ? -s + target / z - ratio(s, z) * dz : -r - move;
}

// The longest step that keeps v + alpha dv in the cone.
__device__ inline double reach(double v, double dv) { return dv < 0 ? -v / dv : UNLIMITED; }

// How far to shift every row of a starting vector into the cone, from its lowest entry and its largest magnitude.
// Reference: Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", section 5.3.
__device__ inline double start_shift(double lowest, double largest) {
    return lowest > 1e-3 * (1 + largest) ? 0.0 : 1 - lowest;
}

// Whether a row is active: its multiplier outweighs its slack (in equilibrated units).
__device__ inline bool active(double s, double z) { return z > s; }

}  // namespace cone
}  // namespace diffopt
