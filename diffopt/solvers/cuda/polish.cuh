// From an active set to its exact point, the proof that it is the solution, and what is kept of it.
#pragma once
#include "setup.cuh"

namespace diffopt {

constexpr double SIGN_SLACK = 1e-10;  // how negative a multiplier or slack of an accepted point may be, relative
constexpr double EXACT = 1e-12;       // relative residual at which a polished point is at rounding level
constexpr int REFINEMENTS = 2;        // one took x from 4e-8 to 1e-10 on ill-conditioned sets, the second one to 1e-14

// The value that active direction k holds C x at, equilibrated.
__device__ inline double held_at(const Sizes& z, const Memory& at, int k) {
    double target = 0;
    z.each_row(k, [&](int row, double sign) {
        if (sign == at.active[k]) target = sign * at.side[row];
    });
    return target;
}

// The value of direction k, equilibrated, after `products`.
__device__ inline double value_of(const Sizes& z, const Memory& at, int k) {
    return k < z.m ? at.scale.rows[z.p + k] * at.kkt.Gx[k] : at.x[k - z.m];
}

// List the directions of an active set in their order; returns how many there are.
template <class Team>
DIFFOPT_STEP int list_active(const Team& team, const Sizes& z, const int* active, int* list) {
    int total = 0;
    for (int k = team.rank; k < z.c; k += team.size) {
        int before = 0;
        for (int j = 0; j < k; ++j) before += active[j] != 0;
        if (active[k] != 0) list[before] = 2 * k + (active[k] < 0);
    }
    for (int k = 0; k < z.c; ++k) total += active[k] != 0;
    team.sync();
    return total;
}

// Factor P_aa for the directions in F.list into F.K. Returns whether they are independent.
template <class Job>
DIFFOPT_STEP bool factor_active(Job& work) {
    DIFFOPT_UNPACK(work);
    const ActiveFactor& F = work.F;
    for (int item = team.rank; item < F.active * F.active; item += team.size) {
        const int i = item % F.active, j = item / F.active;
        if (i >= j) F.K(i, j) = at.P(z, F.direction(i), F.direction(j));
    }
    double least, most;
    if (!cholesky(team, F.K, F.active)) return false;
    pivot_range(team, F.K, F.active, least, most);
    return least >= DEPENDENT;
}

// The equilibrated right-hand sides that lead from a point, whose products are in at.kkt, to that of the active set.
template <class Job>
DIFFOPT_STEP void residual_of_active(Job& work) {
    DIFFOPT_UNPACK(work);
    const auto& data = work.data;
    const ActiveFactor& F = work.F;
    const KktVectors& v = at.kkt;
    for (int i = team.rank; i < z.n; i += team.size) {
        v.r_x[i] = -at.scale.cost * at.scale.d[i] * (v.Qx[i] + double(data.q[i]) + v.pull[i] + v.push[i]);
    }
    for (int e = team.rank; e < z.p; e += team.size) v.r_eq[e] = at.b[e] - at.scale.rows[e] * v.Ax[e];
    for (int k = team.rank; k < F.active; k += team.size) {
        const int direction = F.direction(k);
        v.r_a[k] = held_at(z, at, direction) - value_of(z, at, direction);
    }
}

// Judge the point whose products are in at.kkt.
template <class Job>
DIFFOPT_STEP void judge(Job& work) {
    DIFFOPT_UNPACK(work);
    const auto& data = work.data;
    const Reduced& reduced = work.reduced;
    const KktVectors& v = at.kkt;
    const Scaling& scale = at.scale;
    // Errors and sizes in original, then in equilibrated units; minus the lowest slack; the largest side held or violated.
    double most[10] = {0, 0, 0, 0, reduced.b_size_o, 0, 0, reduced.b_size, -1, 0};
    double sums[4] = {0, 0, 0, 0};
    for (int i = team.rank; i < z.n; i += team.size) {
        const double q = double(data.q[i]), unit = scale.cost * scale.d[i];
        const double error = fabs(v.Qx[i] + q + v.pull[i] + v.push[i]);
        const double size = larger(larger(fabs(v.Qx[i]), fabs(q)), larger(fabs(v.pull[i]), fabs(v.push[i])));
        most[0] = larger(most[0], error);
        most[1] = larger(most[1], size);
        most[2] = larger(most[2], error * unit);
        most[3] = larger(most[3], size * unit);
        sums[0] += v.Qx[i] * v.x_o[i];
        sums[1] += q * v.x_o[i];
    }
    double primal = 0, primal_scaled = 0;
    for (int e = team.rank; e < z.p; e += team.size) {
        const double b = double(data.b[e]), error = fabs(v.Ax[e] - b);
        primal = larger(primal, error);
        primal_scaled = larger(primal_scaled, error * scale.rows[e]);
        most[4] = larger(most[4], fabs(v.Ax[e]));
        most[7] = larger(most[7], fabs(v.Ax[e]) * scale.rows[e]);
        sums[2] += b * v.eq_o[e];
    }
    for (int k = team.rank; k < z.c; k += team.size) {
        const double value = value_of(z, at, k);
        const double unit = k < z.m ? 1 / scale.rows[z.p + k] : scale.d[k - z.m];
        z.each_row(k, [&](int row, double sign) {
            if (!present(at.side[row])) return;
            const double slack = at.side[row] - sign * value, side = fabs(at.side[row]);
            // A far side that x meets must not hide what else it violates.
            const double size = slack < 0 ? larger(fabs(value), side) : fabs(value);
            primal = larger(primal, -slack * unit);
            primal_scaled = larger(primal_scaled, -slack);
            most[4] = larger(most[4], size * unit);
            most[7] = larger(most[7], size);
            if (sign != at.active[k]) most[8] = larger(most[8], -slack);
            if (slack < 0 || sign == at.active[k]) most[9] = larger(most[9], side);
            if (sign == at.active[k]) sums[3] += sign * at.candidate[k] * at.side[row] / scale.cost;
        });
    }
    most[5] = primal, most[6] = primal_scaled;
    team.max(most);
    team.sum(sums);
    const double gap = fabs(sums[0] + sums[1] + sums[2] + sums[3]);
    const double terms = larger(larger(fabs(sums[0]), fabs(sums[1])), larger(fabs(sums[2]), fabs(sums[3])));
    Quality& found = work.quality;
    found.dual = most[0] / (1 + most[1]);
    found.primal = most[5] / (1 + most[4]);
    found.gap = gap / (1 + terms);
    double worst = larger(found.dual, larger(found.primal, found.gap));
    worst = larger(worst, larger(most[2] / (1 + most[3]), most[6] / (1 + most[7])));
    found.worst = larger(worst, gap * scale.cost / (1 + terms * scale.cost));
    found.lowest_slack = -most[8], found.least_slack = -SIGN_SLACK * (1 + most[9]);
}

// Solve for the point of at.active, and decide whether it is the solution. Its x, nu and forces are then in at.x, at.nu and
// at.candidate, and its products in at.kkt. With `flips`, at.next says which rows' signs speak for another set.
template <class Job>
DIFFOPT_STEP bool solve_active(Job& work, double accept, bool flips, bool& flipped) {
    DIFFOPT_UNPACK(work);
    const auto& data = work.data;
    ActiveFactor& F = work.F;
    flipped = false;
    F.active = list_active(team, z, at.active, at.list);
    F.K.dim = F.active;
    if (!factor_active(work)) return false;
    const KktVectors& v = at.kkt;
    for (int i = team.rank; i < z.n; i += team.size) {
        at.x[i] = 0;
        v.r_x[i] = -at.scale.cost * at.scale.d[i] * double(data.q[i]);
    }
    for (int e = team.rank; e < z.p; e += team.size) at.nu[e] = 0, v.r_eq[e] = at.b[e];
    for (int k = team.rank; k < z.c; k += team.size) at.candidate[k] = 0;
    for (int k = team.rank; k < F.active; k += team.size) v.r_a[k] = held_at(z, at, F.direction(k));
    for (int round = 0;; ++round) {
        solve_kkt(team, z, F, v);
        for (int i = team.rank; i < z.n; i += team.size) at.x[i] += v.x[i];
        for (int e = team.rank; e < z.p; e += team.size) at.nu[e] += v.eq[e];
        for (int k = team.rank; k < F.active; k += team.size) at.candidate[F.direction(k)] += v.force[k];
        team.sync();
        if (round == REFINEMENTS) break;
        products(team, z, data, at.scale, at.x, at.nu, at.candidate, v);
        residual_of_active(work);
    }

    double multiplier[2] = {0, -1};  // the largest, and minus the lowest
    for (int k = team.rank; k < z.c; k += team.size) {
        if (at.active[k] == 0) continue;
        multiplier[0] = larger(multiplier[0], fabs(at.candidate[k]));
        multiplier[1] = larger(multiplier[1], -at.active[k] * at.candidate[k]);
    }
    team.max(multiplier);
    const double least_z = -SIGN_SLACK * (1 + multiplier[0]);
    for (int k = team.rank; k < z.c; k += team.size) {
        at.next[k] = at.active[k] * at.candidate[k] < least_z ? 0 : at.active[k];
        at.candidate[k] = at.active[k] * fmax(at.active[k] * at.candidate[k], 0.0);
    }
    team.sync();
    products(team, z, data, at.scale, at.x, at.nu, at.candidate, v);
    judge(work);
    const Quality& quality = work.quality;
    const bool signs = -multiplier[1] >= least_z && quality.lowest_slack >= quality.least_slack;
    if (signs && quality.worst <= accept) return true;
    if (flips && !signs) {
        for (int k = team.rank; k < z.c; k += team.size) {
            const double value = value_of(z, at, k);
            z.each_row(k, [&](int row, double sign) {
                const bool wrong = at.side[row] - sign * value < quality.least_slack;
                if (present(at.side[row]) && at.active[k] == 0 && wrong) at.next[k] = int(sign);
            });
            at.active[k] = at.next[k];
        }
        flipped = true;
        team.sync();
    }
    return false;
}

// Round the accepted point to what will be written, and judge it anew. Returns whether it may be called solved. (Units are
// powers of two, so that changing them rounds nothing.)
template <class Job>
DIFFOPT_STEP bool claim(Job& work) {
    using T = typename Job::Real;
    if constexpr (sizeof(T) == sizeof(double)) return true;
    DIFFOPT_UNPACK(work);
    const Scaling& scale = at.scale;
    auto rounded = [](double v, double unit) { return double(T(v * unit)) / unit; };
    for (int i = team.rank; i < z.n; i += team.size) at.x[i] = rounded(at.x[i], scale.d[i]);
    for (int e = team.rank; e < z.p; e += team.size) at.nu[e] = rounded(at.nu[e], scale.rows[e] / scale.cost);
    for (int k = team.rank; k < z.c; k += team.size) {
        const double unit = k < z.m ? scale.rows[z.p + k] : 1 / scale.d[k - z.m];
        at.candidate[k] = rounded(at.candidate[k], unit / scale.cost);
    }
    team.sync();
    products(team, z, work.data, scale, at.x, at.nu, at.candidate, at.kkt);
    judge(work);
    const Quality& quality = work.quality;
    return larger(larger(quality.primal, quality.dual), quality.gap) <= work.task.claim;
}

// Write the accepted point, and what the backward pass needs.
template <class Job>
DIFFOPT_STEP void store(Job& work) {
    using T = typename Job::Real;
    DIFFOPT_UNPACK(work);
    const auto& task = work.task;
    const Kept& kept = work.kept;
    ActiveFactor& F = work.F;
    const long long i = work.i;
    const int n = z.n, p = z.p, m = z.m;
    const Scaling& scale = at.scale;
    const double weak = task.weak_tolerance;
    double counts[2] = {0, 0};  // weakly active rows; active ones that the gradient leaves out
    for (int k = team.rank; k < n; k += team.size) {
        task.x[i * n + k] = T(at.kkt.x_o[k]);
        kept.x[k] = at.kkt.x_o[k];
        kept.d[k] = scale.d[k];
        // Without bounds nothing else writes these.
        if (!z.lower) task.lam_lower[i * n + k] = T(0);
        if (!z.upper) task.lam_upper[i * n + k] = T(0);
    }
    for (int e = team.rank; e < p; e += team.size) {
        task.nu[i * p + e] = T(at.kkt.eq_o[e]);
        kept.nu[e] = at.kkt.eq_o[e];
    }
    for (int e = team.rank; e < p + m; e += team.size) kept.rows[e] = scale.rows[e];
    for (int k = team.rank; k < z.c; k += team.size) {
        const double value = value_of(z, at, k);
        int strict = 0;
        z.each_row(k, [&](int row, double sign) {
            const bool there = present(at.side[row]), active = sign == at.active[k];
            const double slack = active ? 0.0 : fmax(at.side[row] - sign * value, 0.0);
            const double multiplier = active ? sign * at.candidate[k] : 0.0;
            const bool is_weak = there && slack <= weak && multiplier <= weak;
            if (is_weak) counts[0] += 1;
            if (active && is_weak) counts[1] += 1;
            if (active && !is_weak) strict = int(sign);
            if (k < m) {
                const double lam = scale.rows[p + k] * multiplier / scale.cost;
                task.s[i * m + k] = T(slack / scale.rows[p + k]);
                task.lam[i * m + k] = T(lam);
                kept.lam[k] = strict ? lam : 0.0;
            } else {
                (sign > 0 ? task.lam_upper : task.lam_lower)[i * n + k - m] =
                    T(multiplier / (scale.cost * scale.d[k - m]));
            }
        });
        at.next[k] = strict;
    }
    team.sum(counts);
    if (counts[1] > 0) {
        F.active = list_active(team, z, at.next, at.list);
        F.K.dim = F.active;
        factor_active(work);
    }
    for (int item = team.rank; item < z.eliminated(); item += team.size) kept.E[item] = at.W.at[item];
    if constexpr (!Job::Team::LARGE) {
        for (int item = team.rank; item < triangle(F.active); item += team.size) kept.K[item] = F.K.at[item];
    }
    for (int k = team.rank; k < F.active; k += team.size) kept.list[1 + k] = at.list[k];
    if (team.rank == 0) {
        kept.list[0] = F.active;
        kept.cost[0] = scale.cost;
        task.status[i] = 1;
        task.counts[i] = work.iterations;
        task.counts[task.batch + i] = (long long)counts[0];
        task.counts[2 * task.batch + i] = 0;
        task.residuals[i] = work.quality.primal;
        task.residuals[task.batch + i] = work.quality.dual;
        task.residuals[2 * task.batch + i] = work.quality.gap;
    }
}

}  // namespace diffopt
