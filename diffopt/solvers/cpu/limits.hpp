// Tolerances and counts that more than one method goes by.
#pragma once

namespace diffopt {

constexpr int EQUILIBRATION_PASSES = 6;
constexpr double SAFE_CONDITION = 1e8;  // condition of Q, estimated from its pivots, up to which it is eliminated first
constexpr double DEPENDENT = 1e-7;      // a row depends on others if its pivot, in equilibrated units, is below this
constexpr double TRY = 1e-3;            // relative residual below which a repeated active set is tried
constexpr double ENOUGH = 1e-12;        // relative residual at which a polished point is as good as it gets
constexpr double SIGN = 1e-10;          // relative size of a wrong sign that is rounding error
constexpr double AHEAD = 1e-4;          // complementarity may not fall below this times the residual (in the general method, of feasibility)
constexpr int FLIPS = 4;                // active sets that are tried at a time

}  // namespace diffopt
