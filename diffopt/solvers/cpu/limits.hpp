// Tolerances and counts that more than one method goes by.
#pragma once

namespace diffopt {

constexpr int EQUILIBRATION_PASSES = 6;
constexpr double SAFE_CONDITION = 1e8;  // condition of Q, estimated from its pivots, up to which it is eliminated first
constexpr double DEPENDENT = 1e-7;      // a row depends on others if its pivot, in equilibrated units, is below this
constexpr double CLOSE = 3e-5;          // squared sine of a row's angle with the others below which derivatives need refinement
constexpr double TRY = 1e-3;            // relative residual below which a repeated active set is tried
constexpr double ENOUGH = 1e-12;        // relative residual at which a polished point is as good as it gets
constexpr double SHARE = 1e-6;          // of the depth of a certificate, from which a term takes part in it
constexpr double LARGE = 1e6;           // size of a solution, in equilibrated units, from which it is the unit
constexpr double SIGN = 1e-10;          // relative size of a wrong sign that is rounding error
constexpr double AHEAD = 1e-4;          // complementarity may not fall below this times the residual (in the general method, of feasibility)
constexpr int FLIPS = 4;                // active sets that are tried at a time
constexpr int WARM_FLIPS = 10;          // and from an earlier solution, whose active set is wrong in places only

// From an earlier solution, as diffopt.solvers.warm.
constexpr double HELD_FROM = 1e-7;      // multiplier of an earlier solution, in equilibrated units, from which its row is held
constexpr double LARGEST_ERROR = 100;   // its error on the new data, in equilibrated units, up to which to begin near it
constexpr double SMALLEST_ERROR = 1e-8; // what its error counts at least: to begin in the interior
constexpr int64_t WARM_STEPS = 15;      // steps after which such a beginning is given up

}  // namespace diffopt
