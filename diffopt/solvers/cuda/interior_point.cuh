// The interior-point loop on the directions' forces alone: x, nu and Q have dropped out of it, so that stationarity and
// the equalities hold exactly. Mehrotra's method as in diffopt/solvers/interior_point.py, which has the references.
#pragma once
#include "cone.cuh"
#include "polish.cuh"

namespace diffopt {

constexpr double AHEAD = 1e-4;         // how far complementarity may fall below the residual before it is held
constexpr double FAR = 1e6;            // side of a row, equilibrated, beyond which it counts less at the start
constexpr double SHIFT = 1e-10;        // regularisation of the matrix of a step, equilibrated
constexpr double WORTH_TRYING = 1e-3;  // relative residual at which an active set that has repeated is tried
constexpr double CONVERGED = 1e-9;     // ... and at which any is, and at which the loop has reached its own end
constexpr int AFTERTHOUGHTS = 3;       // iterations beyond that end in which the active set may still settle
constexpr int FLIPS = 4;               // rounds in which a last active set may change by its own signs

struct Measure {
    double mu, residual;
    bool repeated, untried;
};

// f and the weights of a step from s and z, u = u_free - P f, and from it the residual; reads the active set off into
// at.active.
template <class Job>
DIFFOPT_STEP Measure measure(Job& work) {
    DIFFOPT_UNPACK(work);
    const Reduced& reduced = work.reduced;
    // f'u_pull, f'(u_free - u_pull), f'Pf, d'z, the gap z'(d - C x), s'z
    double sums[6] = {0, 0, 0, 0, 0, 0};
    // Errors and sizes, equilibrated and original; whether the set is a new one, and whether it has not been tried.
    double most[6] = {0, reduced.b_size, 0, reduced.b_size_o, 0, 0};
    const Packed W = team.matrix(at.W);
    double* forces = in_shared(at.f);
    // Forces from multipliers, so that the point is stationary for the multipliers there are. With them 1/w, for the step.
    for (int k = team.rank; k < z.c; k += team.size) {
        double force = 0, weight = 0;
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            force += sign * at.z[row];
            weight += 1 / cone::ratio(at.s[row], at.z[row]);
        });
        forces[k] = force;
        at.flex[k] = weight > 0 ? 1 / weight : -1.0;
    }
    team.sync();
    for (int k = team.rank; k < z.c; k += team.size) {
        double push = 0;
#pragma unroll 4
        for (int j = 0; j < k; ++j) push += W(z.p + k, z.p + j) * forces[j];
#pragma unroll 4
        for (int j = k; j < z.c; ++j) push += W(z.p + j, z.p + k) * forces[j];
        const double u = at.u_free[k] - push, f = forces[k];
        const double unit = k < z.m ? 1 / at.scale.rows[z.p + k] : at.scale.d[k - z.m];
        at.u[k] = u;
        sums[0] += f * at.u_pull[k];
        sums[1] += f * (at.u_free[k] - at.u_pull[k]);
        sums[2] += f * push;
        int active = 0;
        z.each_row(k, [&](int row, double sign) {
            const double side = at.side[row];
            if (!present(side)) return;
            const double over = sign * u - side, size = over > 0 ? larger(fabs(u), fabs(side)) : fabs(u);
            sums[3] += side * at.z[row];
            sums[4] -= at.z[row] * over;
            sums[5] += cone::complementarity(at.s[row], at.z[row]);
            most[0] = larger(most[0], over);
            most[1] = larger(most[1], size);
            most[2] = larger(most[2], over * unit);
            most[3] = larger(most[3], size * unit);
            if (cone::active(at.s[row], at.z[row]) && active == 0) active = int(sign);
        });
        at.active[k] = active;
        if (active != at.last[k]) most[4] = 1;
        if (active != at.tried[k]) most[5] = 1;
        at.last[k] = active;
    }
    team.sum(sums);
    team.max(most);
    const double cost = at.scale.cost;
    const double xQx = reduced.xQx - 2 * sums[0] + sums[2], qx = reduced.qx + sums[0], bnu = reduced.bnu - sums[1];
    const double terms = larger(larger(fabs(xQx), fabs(qx)), larger(fabs(bnu), fabs(sums[3])));
    const double gap = fabs(sums[4]);
    double residual = larger(most[0] / (1 + most[1]), most[2] / (1 + most[3]));
    residual = larger(residual, larger(gap / (1 + terms), gap / (cost + terms)));  // gap/cost over 1 + terms/cost
    return {sums[5] / (reduced.rows > 0 ? reduced.rows : 1), residual, most[4] == 0, most[5] != 0};
}

// K <- P + diag(1/w + shift), factored; directions without rows are left out. at.flex: 1/w, or -1 for those.
template <class Job>
DIFFOPT_STEP bool factor_step(Job& work) {
    DIFFOPT_UNPACK(work);
    const Packed K = team.matrix(at.K), W = team.matrix(at.W);
    const double* flex = in_shared(at.flex);
    team.sync();
    for (int j = 0; j < z.c; ++j) {
        for (int i = j + team.rank; i < z.c; i += team.size) {
            const bool there = flex[i] >= 0 && flex[j] >= 0;
            const double own = flex[i] < 0 ? 1.0 : flex[i] + SHIFT;
            K(i, j) = (there ? W(z.p + i, z.p + j) : 0.0) + (i == j ? own : 0.0);
        }
    }
    return cholesky(team, at.K, z.c);
}

// at.kkt.force <- K^-1 at.kkt.r_a.
template <class Job>
__device__ inline void solve_step(Job& work) {
    DIFFOPT_UNPACK(work);
    team.sync();
    solve_lower(team, at.K, z.c, at.kkt.r_a, at.kkt.rest);
    solve_upper(team, at.K, z.c, at.kkt.rest, at.kkt.force);
}

// The first iterate: the minimiser of the objective plus half the sum of squared distances from the sides, and s and z from
// these. A row whose side is far away counts less, so that a bound of 1e12 that nobody will meet pulls nothing there.
template <class Job>
DIFFOPT_STEP bool start(Job& work) {
    DIFFOPT_UNPACK(work);
    for (int k = team.rank; k < z.c; k += team.size) {
        double weight = 0, pull = 0;
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            const double away = larger(1.0, fabs(at.side[row]) / FAR), e = away * away;
            weight += 1 / e;
            pull += sign * at.side[row] / e;
        });
        at.flex[k] = weight > 0 ? 1 / weight : -1.0;
        at.kkt.r_a[k] = weight > 0 ? at.u_free[k] - pull / weight : 0.0;
        at.last[k] = at.tried[k] = 2;  // no set at all
    }
    if (!factor_step(work)) return false;
    solve_step(work);
    double most[4] = {-cone::UNLIMITED, 0, -cone::UNLIMITED, 0};  // minus the lowest, and the largest size, of s and z
    for (int k = team.rank; k < z.c; k += team.size) {
        double u = at.u_free[k];
        for (int j = 0; j < z.c; ++j) u -= (j < k ? at.P(z, k, j) : at.P(z, j, k)) * at.kkt.force[j];
        z.each_row(k, [&](int row, double sign) {
            at.s[row] = at.z[row] = 1;
            if (!present(at.side[row])) return;
            const double away = larger(1.0, fabs(at.side[row]) / FAR), e = away * away;
            at.s[row] = at.side[row] - sign * u;
            at.z[row] = -at.s[row] / e;
            most[0] = larger(most[0], -at.s[row]);
            most[1] = larger(most[1], fabs(at.s[row]));
            most[2] = larger(most[2], -at.z[row]);
            most[3] = larger(most[3], fabs(at.z[row]));
        });
    }
    team.max(most);
    if (!finite(most[1]) || !finite(most[3])) return false;
    const double shift_s = cone::start_shift(-most[0], most[1]), shift_z = cone::start_shift(-most[2], most[3]);
    for (int k = team.rank; k < z.c; k += team.size) {
        z.each_row(k, [&](int row, double) {
            if (!present(at.side[row])) return;
            at.s[row] += shift_s;
            at.z[row] += shift_z;
            if (at.s[row] > FAR) at.z[row] = fmin(at.z[row], FAR / at.s[row]);  // else such rows alone would set mu
        });
    }
    return true;
}

// One direction, into at.ds and at.dz: affine, or with the corrector, whose target is centre - at.product. Returns the
// longest step inside the cone, at most 1. at.kkt.force then holds the forces' change.
template <class Job>
DIFFOPT_STEP double direction(Job& work, bool corrector, double centre) {
    DIFFOPT_UNPACK(work);
    auto target_of = [&](int row) { return corrector ? centre - at.product[row] : 0.0; };
    for (int k = team.rank; k < z.c; k += team.size) {
        double pull = 0;
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            const double s = at.s[row], r = sign * at.u[k] + s - at.side[row];
            pull += sign * cone::side(r, s, at.z[row], target_of(row)) / cone::ratio(s, at.z[row]);
        });
        at.gamma[k] = at.flex[k] < 0 ? 0.0 : pull * at.flex[k];
        at.kkt.r_a[k] = -at.gamma[k];
    }
    solve_step(work);
    double blocked[1] = {-1};  // minus the longest step
    for (int k = team.rank; k < z.c; k += team.size) {
        if (at.flex[k] < 0) continue;
        const double force = at.kkt.force[k], du = force * at.flex[k] + at.gamma[k];
        // Of a variable's two bounds the one with the smaller weight is computed directly; the other takes the rest of
        // the combined force, which the system knows accurately.
        double direct[2] = {0, 0}, e[2] = {0, 0};
        bool on[2] = {false, false};
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            const int place = sign > 0;
            const double s = at.s[row], r = sign * at.u[k] + s - at.side[row];
            on[place] = true;
            e[place] = cone::ratio(s, at.z[row]);
            direct[place] = (sign * du - cone::side(r, s, at.z[row], target_of(row))) / e[place];
        });
        const bool lower_is_light = on[1] && (!on[0] || e[0] >= e[1]);
        if (lower_is_light) {
            direct[1] = force + (on[0] ? direct[0] : 0.0);
        } else {
            direct[0] = (on[1] ? direct[1] : 0.0) - force;
        }
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            const double s = at.s[row], v = at.z[row], r = sign * at.u[k] + s - at.side[row];
            const double dz = direct[sign > 0];
            at.dz[row] = dz;
            at.ds[row] = cone::slack_step(r, s, v, target_of(row), sign * du, dz);
            blocked[0] = larger(blocked[0], -cone::reach(s, at.ds[row]));
            blocked[0] = larger(blocked[0], -cone::reach(v, dz));
        });
    }
    team.max(blocked);
    return -blocked[0];
}

// s'z after an affine step of length alpha, and at.product for the corrector.
template <class Job>
DIFFOPT_STEP double affine_complementarity(Job& work, double alpha) {
    DIFFOPT_UNPACK(work);
    double sums[1] = {0};
    for (int k = team.rank; k < z.c; k += team.size) {
        z.each_row(k, [&](int row, double) {
            if (!present(at.side[row])) return;
            const double s = at.s[row] + alpha * at.ds[row], v = at.z[row] + alpha * at.dz[row];
            sums[0] += cone::complementarity(s, v);
            at.product[row] = at.ds[row] * at.dz[row];
        });
    }
    team.sum(sums);
    return sums[0];
}

// Take a step. Ends without a barrier: a row belongs to one thread.
template <class Job>
DIFFOPT_STEP void advance(Job& work, double alpha) {
    DIFFOPT_UNPACK(work);
    for (int k = team.rank; k < z.c; k += team.size) {
        z.each_row(k, [&](int row, double) {
            if (!present(at.side[row])) return;
            at.s[row] += alpha * at.ds[row];
            at.z[row] += alpha * at.dz[row];
        });
    }
}

// Try the active set at.active. At the loop's end it may change by its own signs, and the tolerance is what counts.
template <class Job>
DIFFOPT_STEP bool polish(Job& work, bool end) {
    const double accept = end ? work.task.tolerance : fmin(EXACT, work.task.tolerance);
    DIFFOPT_UNPACK(work);
    for (int k = team.rank; k < z.c; k += team.size) at.tried[k] = at.active[k];
    team.sync();
    for (int round = 0; round < FLIPS; ++round) {
        bool flipped;
        const bool last = round + 1 == FLIPS;
        if (solve_active(work, accept, end && !last, flipped)) return true;
        if (!flipped) return false;
    }
    return false;
}

// A predictor and corrector step from a measured iterate. Returns how long it was, negative where linear algebra broke down.
template <class Job>
DIFFOPT_STEP double take_step(Job& work, const Measure& now, bool slow) {
    if (!factor_step(work)) return -1;
    const double affine = affine_complementarity(work, direction(work, false, 0.0));
    // sigma = (mu_affine / mu)^3; but complementarity must not run ahead of feasibility.
    const double share = fmin(fmax(affine / work.reduced.rows / (now.mu > 0 ? now.mu : 1.0), 0.0), 1.0);
    const double sigma = now.mu < AHEAD * now.residual ? 1.0 : share * share * share;
    const double reach = direction(work, true, sigma * now.mu);
    // An iterate far from the centre is blocked again and again; short steps let the centring work.
    const double eta = slow && reach < 0.9 ? 0.9 : fmin(fmax(1 - now.mu, 0.995), 1 - 1e-7);
    const double alpha = fmin(eta * reach, 1.0);
    advance(work, alpha);
    return alpha;
}

// Iterate until an active set proves right. Returns whether one did; its point is then in place for `store`.
template <class Job>
DIFFOPT_STEP bool iterate(Job& work) {
    if (!start(work)) return false;
    double last_mu = cone::UNLIMITED;
    int slow = 0, stalled = 0, past_end = 0;
    for (;; ++work.iterations) {
        const Measure now = measure(work);
        if (!finite(now.residual)) return false;
        const bool end = now.residual <= CONVERGED;
        const bool last = work.iterations >= work.task.max_iterations || stalled >= 3 || past_end >= AFTERTHOUGHTS ||
                          work.reduced.rows == 0;
        const bool worth = end || (now.repeated && now.residual <= WORTH_TRYING);
        if (last || (worth && now.untried) || (end && past_end == 0)) {
            if (polish(work, end || last)) return true;
        }
        if (last) return false;
        past_end += end;
        slow += now.mu > 0.7 * last_mu;
        last_mu = now.mu;
        const double alpha = take_step(work, now, slow >= 2);
        if (alpha < 0) return false;
        stalled = alpha < 1e-4 ? stalled + 1 : 0;
    }
}

// Leave instance i to another executor; with NaN, so that nobody takes what happens to lie there for an answer.
template <class Job>
DIFFOPT_STEP void give_up(Job& work) {
    using T = typename Job::Real;
    DIFFOPT_UNPACK(work);
    const auto& task = work.task;
    const long long i = work.i;
    const double nothing = nan("");
    auto fill = [&](T* to, int count) {
        for (int k = team.rank; k < count; k += team.size) to[i * count + k] = T(nothing);
    };
    fill(task.x, z.n), fill(task.s, z.m), fill(task.lam, z.m), fill(task.nu, z.p);
    fill(task.lam_lower, z.n), fill(task.lam_upper, z.n);
    if (team.rank == 0) {
        task.status[i] = 0;
        work.kept.list[0] = -1;
        for (int k = 0; k < 3; ++k) {
            task.counts[k * task.batch + i] = k == 0 ? work.iterations : 0;
            task.residuals[k * task.batch + i] = nothing;
        }
        atomicAdd(task.unsolved, 1);
    }
}

// Solve instance i by the team of this place among all that are running.
template <class T, class Team>
__device__ inline void solve_instance(
    const Team& team, const Forward<T>& task, long long i, long long place, double* shared) {
    Work<T, Team> work(team, task, i, place, shared);
    if (prepare(work) && iterate(work) && claim(work)) {
        store(work);
    } else {
        give_up(work);
    }
}

}  // namespace diffopt
