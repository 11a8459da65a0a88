// What is done once for each problem: load, check, equilibrate, factor Q, eliminate x and the equalities.
#pragma once
#include "kkt.cuh"

namespace diffopt {

// Estimated condition of Q up to which it is eliminated first, and the squared pivot below which a row counts as
// dependent on the others; both as in the torch executor.
constexpr double SAFE_CONDITION = 1e8;
constexpr double DEPENDENT = 1e-7;

// The memory of one team that solves a problem. In shared memory two regions of matrices change their tenants:
//   first   L, then W: all directions' products V'V, of which the first p columns become E and the rest P
//   second  V, then K (the matrix of a step or of an active set) and L again
// A large problem has W in its team's workspace, and the others where they are kept anyway.
struct Memory {
    Packed L, W, K;
    double *V, *second_L;
    KktVectors kkt;
    Scaling scale;
    double *x, *nu, *t, *b;                          // candidate point; L^-1 q; b, equilibrated
    double *u, *u_free, *u_pull, *f, *gamma, *flex;  // per direction, see `Reduced` and the loop
    double *candidate;                               // per direction: forces of a polished point
    double *s, *z, *side, *ds, *dz, *product;        // per row
    int *active, *last, *tried, *next, *list;        // per direction: 0, 1 (row of G or upper bound) or -1 (lower bound)

    __host__ __device__ static int first(const Sizes& z) {
        return triangle(z.n) > triangle(z.all) ? triangle(z.n) : triangle(z.all);
    }
    __host__ __device__ static int second(const Sizes& z) {
        const int later = triangle(z.c) + triangle(z.n);
        return z.n * z.ld > later ? z.n * z.ld : later;
    }
    // Shared memory in doubles, with `threads` for the team's scratch memory and 1 for its flag.
    __host__ __device__ static int size(const Sizes& z, int threads, bool large) {
        return (large ? 0 : first(z) + second(z)) + KktVectors::size(z) + 3 * z.n + 3 * z.p + z.m + 7 * z.c +
               6 * z.rows + (5 * z.c + 1) / 2 + threads + 1;
    }

    // The workspace of a large problem, in doubles.
    __host__ __device__ static int far(const Sizes& z) { return triangle(z.all); }

    // Lay the memory of the team of this place out, and give the team its own part of it.
    template <class Team>
    __device__ Memory(
        const Sizes& z, double* at, double* workspace, long long place, const Kept& kept, Team& team) {
        auto take = [&at](int count) {
            double* start = at;
            at += count;
            return start;
        };
        if constexpr (Team::LARGE) {
            L = {kept.L, z.n};
            W = {workspace + place * far(z), z.all};
            V = kept.V;
            K = {kept.K, z.c};
            second_L = kept.L;
        } else {
            double* one = take(first(z));
            double* two = take(second(z));
            L = {one, z.n};
            W = {one, z.all};
            V = two;
            K = {two, z.c};
            second_L = two + triangle(z.c);
        }
        kkt.place(z, take);
        scale.d = take(z.n), x = take(z.n), t = take(z.n);
        nu = take(z.p), b = take(z.p);
        scale.rows = take(z.p + z.m);
        u = take(z.c), u_free = take(z.c), u_pull = take(z.c), f = take(z.c);
        gamma = take(z.c), flex = take(z.c), candidate = take(z.c);
        s = take(z.rows), this->z = take(z.rows), side = take(z.rows);
        ds = take(z.rows), dz = take(z.rows), product = take(z.rows);
        int* ints = reinterpret_cast<int*>(take((5 * z.c + 1) / 2));
        active = ints, last = ints + z.c, tried = ints + 2 * z.c, next = ints + 3 * z.c, list = ints + 4 * z.c;
        team.scratch = take(team.size);
        team.flag = reinterpret_cast<int*>(take(1));
    }

    // P(i, j): what is left of the directions' products, i >= j.
    __device__ double& P(const Sizes& z, int i, int j) const { return W(z.p + i, z.p + j); }
};

// The objective and the equalities as functions of the directions' forces f:
//   C x = u_free - P f,   x'Qx = xQx - 2 f'u_pull + f'Pf,   q'x = qx + f'u_pull,   b'nu = bnu - f'(u_free - u_pull)
// and b_size the largest |b| in equilibrated units, b_size_o as given.
struct Reduced {
    double xQx, qx, bnu, b_size, b_size_o;
    int rows;
};

// Relative residuals of a point, in original units and the worst in original and equilibrated units alike, and its
// lowest slack of an inactive row, in equilibrated units, and down to what a slack is rounding error.
struct Quality {
    double primal, dual, gap, worst, lowest_slack, least_slack;
};

// All that solving one problem works on: one argument, for registers are what calls run out of.
template <class T, class TeamOf>
struct Work {
    using Real = T;
    using Team = TeamOf;
    Team team;
    const Forward<T>& task;
    long long i;
    Sizes z;
    Instance<T> data;
    Kept kept;
    Memory at;
    Reduced reduced;
    ActiveFactor F;
    Quality quality;
    int iterations;

    __device__ Work(const Team& given, const Forward<T>& task, long long i, long long place, double* shared)
        : team(given), task(task), i(i),
          z(int(task.n), int(task.p), int(task.m), task.lower != nullptr, task.upper != nullptr), data(task, i),
          kept(z, task.kept, task.lists, task.keep ? i : place),
          at(z, shared, task.workspace, place, kept, team), reduced(),
          F{{at.second_L, z.n}, {at.W.at, z.all}, {at.K.at, 0}, kept.V, at.list, 0}, quality(), iterations(0) {}
};

// The names of its parts that a function uses.
#define DIFFOPT_UNPACK(work)                    \
    const typename Job::Team& team = work.team;   \
    const Sizes& z = work.z;                    \
    auto& at = work.at;                         \
    (void)team, (void)z, (void)at

// Load Q's symmetric part, [A' G'] and the sides, unscaled. Returns whether this executor can take the values.
template <class Job>
DIFFOPT_STEP bool load(Job& work) {
    DIFFOPT_UNPACK(work);
    const auto& data = work.data;
    const int n = z.n, p = z.p, m = z.m;
    bool bad = false;
    for (int item = team.rank; item < n * n; item += team.size) {
        const int i = item / n, j = item % n;
        const double v = double(data.Q[item]);
        bad |= !finite(v);
        if (i >= j) at.L(i, j) = 0.5 * v;
    }
    team.sync();  // the other half is added to these
    for (int item = team.rank; item < n * n; item += team.size) {
        const int i = item / n, j = item % n;
        if (i <= j) at.L(j, i) += 0.5 * double(data.Q[item]);
    }
    for (int item = team.rank; item < (p + m) * n; item += team.size) {
        const int e = item / n, k = item % n;
        const double v = double(e < p ? data.A[item] : data.G[item - p * n]);
        bad |= !finite(v);
        at.V[k * z.ld + e] = v;
    }
    for (int i = team.rank; i < n; i += team.size) bad |= !finite(double(data.q[i]));
    for (int e = team.rank; e < p; e += team.size) bad |= !finite(double(data.b[e]));
    for (int k = team.rank; k < z.c; k += team.size) {
        double low = 0, high = 1;
        z.each_row(k, [&](int row, double sign) {
            const double v = double(k < m ? data.h[k] : (sign > 0 ? data.upper[k - m] : data.lower[k - m]));
            bad |= v != v || (!finite(v) && sign * v < 0);  // NaN, or infinite on the side that leaves nothing
            if (z.lower && z.upper && k >= m) (sign > 0 ? high : low) = v;
            at.side[row] = sign * v;
        });
        bad |= low >= high;  // crossed, or a fixed variable: for another executor
    }
    return !team.any(bad);
}

// Everything up to the first iterate. Returns whether the problem is one that the reduction is safe for.
template <class Job>
DIFFOPT_STEP bool prepare(Job& work) {
    DIFFOPT_UNPACK(work);
    const auto& data = work.data;
    const Kept& kept = work.kept;
    Reduced& reduced = work.reduced;
    const int n = z.n, p = z.p, m = z.m, c = z.c;
    if (!load(work)) return false;
    equilibrate(team, z, at.L, at.V, at.scale, at.kkt.x, at.kkt.t, at.kkt.pulled);
    const Scaling scale = at.scale;

    for (int j = 0; j < n; ++j) {
        for (int i = j + team.rank; i < n; i += team.size) at.L(i, j) *= scale.cost * scale.d[i] * scale.d[j];
    }
    for (int item = team.rank; item < n * (p + m); item += team.size) {
        const int k = item / (p + m), e = item % (p + m);
        at.V[k * z.ld + e] *= scale.rows[e] * scale.d[k];
    }
    for (int item = team.rank; item < n * (z.ld - p - m); item += team.size) {
        const int k = item / (z.ld - p - m), i = item % (z.ld - p - m);  // bounds: unit vectors; then padding
        at.V[k * z.ld + p + m + i] = i == k && i < c - m ? 1.0 : 0.0;
    }
    double size[2] = {0, 0}, rows[1] = {0};
    for (int i = team.rank; i < n; i += team.size) at.kkt.r_x[i] = scale.cost * scale.d[i] * double(data.q[i]);
    for (int e = team.rank; e < p; e += team.size) {
        const double v = double(data.b[e]);
        at.b[e] = scale.rows[e] * v;
        size[0] = larger(size[0], fabs(at.b[e]));
        size[1] = larger(size[1], fabs(v));
    }
    for (int k = team.rank; k < c; k += team.size) {
        z.each_row(k, [&](int row, double) {
            at.side[row] = k < m ? at.side[row] * scale.rows[p + k] : at.side[row] / scale.d[k - m];
            if (!present(at.side[row])) return;
            rows[0] += 1;
        });
    }
    team.max(size);
    team.sum(rows);
    reduced.b_size = size[0], reduced.b_size_o = size[1];
    reduced.rows = int(rows[0]);

    // Q = L L', V = L^-1 [A' C'], t = L^-1 q. L and V go to global memory for polish and backward pass.
    if (!cholesky(team, at.L, n)) return false;
    double least, most;
    pivot_range(team, at.L, n, least, most);
    if (!(least * SAFE_CONDITION >= most)) return false;
    solve_lower_columns(team, at.L, at.V, z.ld, z.all);
    solve_lower(team, at.L, n, at.kkt.r_x, at.t);
    if constexpr (!Job::Team::LARGE) {
        for (int item = team.rank; item < triangle(n); item += team.size) kept.L[item] = at.L.at[item];
        for (int item = team.rank; item < n * z.ld; item += team.size) kept.V[item] = at.V[item];
    }
    double* pulled = at.kkt.pulled;
    for (int j = team.rank; j < z.all; j += team.size) {
        double sum = 0;
        for (int k = 0; k < n; ++k) sum += at.V[k * z.ld + j] * at.t[k];
        pulled[j] = sum;
    }
    team.sync();  // W takes the place of L

    gram(team, at.V, z.ld, n, at.W);
    team.sync();
    if (!cholesky(team, at.W, p)) return false;
    pivot_range(team, at.W, p, least, most);
    if (!(least >= DEPENDENT)) return false;

    // Without any force: E E' nu = -V_e't - b, u = -V_c't - D_ce nu; likewise for what b alone does to C x.
    double* half = at.kkt.half;
    double* half_b = at.kkt.Ax;
    for (int e = team.rank; e < p; e += team.size) at.kkt.r_eq[e] = -pulled[e] - at.b[e];
    for (int e = team.rank; e < p; e += team.size) at.kkt.eq_o[e] = at.b[e];
    team.sync();
    solve_lower(team, at.W, p, at.kkt.r_eq, half);
    solve_lower(team, at.W, p, at.kkt.eq_o, half_b);
    for (int k = team.rank; k < c; k += team.size) {
        double free = -pulled[p + k], pull = 0;
        for (int e = 0; e < p; ++e) {
            free -= at.W(p + k, e) * half[e];
            pull += at.W(p + k, e) * half_b[e];
        }
        at.u_free[k] = free;
        at.u_pull[k] = free - pull;
    }
    team.sync();  // the next solve uses `half` up
    solve_upper(team, at.W, p, half, at.nu);
    double sums[3] = {0, 0, 0};
    for (int k = team.rank; k < n; k += team.size) {
        double v = -at.t[k];
        for (int e = 0; e < p; ++e) v -= at.V[k * z.ld + e] * at.nu[e];
        sums[0] += v * v;
        sums[1] += v * at.t[k];
    }
    for (int e = team.rank; e < p; e += team.size) sums[2] += at.b[e] * at.nu[e];
    team.sum(sums);
    reduced.xQx = sums[0], reduced.qx = sums[1], reduced.bnu = sums[2];
    team.sync();  // K and L take the place of V

    if constexpr (!Job::Team::LARGE) {
        for (int item = team.rank; item < triangle(n); item += team.size) at.second_L[item] = kept.L[item];
        team.sync();
    }
    return true;
}

}  // namespace diffopt
