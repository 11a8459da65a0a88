// The KKT system of an active set: solving with its factors, and the unreduced products that refine what they gave.
//
//     Q x + A' nu + C_a' f = r_x,   A x = r_eq,   C_a x = r_a
//
// in equilibrated units, C_a the active directions and f their forces (of either sign). With Q = L L', V = L^-1 [A' C'] and
// the equalities eliminated by E, what is left is P_aa f = w_a with P = C (Q^-1 - Q^-1 A'(A Q^-1 A')^-1 A Q^-1) C'.
#pragma once
#include "problem.cuh"

namespace diffopt {

// Vectors of one KKT solve, in shared memory: right-hand sides, which are used up, results, and products.
struct KktVectors {
    double *r_x, *r_eq, *r_a;                          // n, p, c
    double *x, *eq, *force;                            // results: n, p, and c (one for each active direction)
    double *t, *half, *rest;                           // scratch: n, p, c
    double *by_direction, *pulled;                     // scratch: all, all
    double *x_o, *eq_o, *lam_o;                        // a point in original units: n, p, m
    double *Qx, *pull, *push, *Ax, *Gx;                // its products there: n, n, n, p, m

    __host__ __device__ static int size(const Sizes& z) { return 7 * z.n + 5 * z.p + 3 * z.c + 2 * z.m + 2 * z.all; }

    template <class Take>
    __device__ void place(const Sizes& z, Take take) {
        r_x = take(z.n), x = take(z.n), t = take(z.n), x_o = take(z.n);
        Qx = take(z.n), pull = take(z.n), push = take(z.n);
        r_eq = take(z.p), eq = take(z.p), half = take(z.p), eq_o = take(z.p), Ax = take(z.p);
        r_a = take(z.c), force = take(z.c), rest = take(z.c);
        lam_o = take(z.m), Gx = take(z.m);
        by_direction = take(z.all), pulled = take(z.all);
    }
};

// Factors as in `Kept`; V in global memory, and L, E and K where the team has its matrices. list: see `Kept`.
struct ActiveFactor {
    Packed L, E, K;
    const double* V;
    const int* list;
    int active;

    __device__ int direction(int k) const { return list[k] / 2; }
};

// Solve the KKT system for (r_x, r_eq, r_a). Results in v.x, v.eq, v.force.
template <class Team>
DIFFOPT_STEP void solve_kkt(const Team& team, const Sizes& z, const ActiveFactor& F, const KktVectors& v) {
    const int p = z.p;
    team.sync();
    solve_lower(team, F.L, z.n, v.r_x, v.t);
    times_transposed(team, F.V, z.n, z.all, z.ld, v.t, v.pulled);
    for (int e = team.rank; e < p; e += team.size) v.r_eq[e] = v.pulled[e] - v.r_eq[e];
    team.sync();
    solve_lower(team, F.E, p, v.r_eq, v.half);
    for (int k = team.rank; k < F.active; k += team.size) {
        const int row = p + F.direction(k);
        double w = v.pulled[row] - v.r_a[k];
        for (int e = 0; e < p; ++e) w -= F.E(row, e) * v.half[e];
        v.r_a[k] = w;
    }
    team.sync();
    solve_lower(team, F.K, F.active, v.r_a, v.rest);
    solve_upper(team, F.K, F.active, v.rest, v.force);
    for (int e = team.rank; e < p; e += team.size) {
        double w = v.half[e];
        for (int k = 0; k < F.active; ++k) w -= F.E(p + F.direction(k), e) * v.force[k];
        v.half[e] = w;
    }
    for (int j = team.rank; j < z.c; j += team.size) v.by_direction[p + j] = 0;
    team.sync();
    solve_upper(team, F.E, p, v.half, v.eq);
    for (int e = team.rank; e < p; e += team.size) v.by_direction[e] = v.eq[e];
    for (int k = team.rank; k < F.active; k += team.size) v.by_direction[p + F.direction(k)] = v.force[k];
    team.sync();
    times(team, F.V, z.n, z.all, z.ld, v.by_direction, v.r_x);
    team.sync();
    for (int i = team.rank; i < z.n; i += team.size) v.t[i] -= v.r_x[i];
    team.sync();
    solve_upper(team, F.L, z.n, v.t, v.x);
}

// Put a point (x, nu, and the force of every direction, equilibrated) and its products with the original data into v, in
// original units. push: G' lam and the bounds' forces.
template <class T, class Team>
DIFFOPT_STEP void products(
    const Team& team, const Sizes& z, const Instance<T>& data, const Scaling& scale, const double* x, const double* nu,
    const double* force, const KktVectors& v) {
    const int n = z.n, p = z.p, m = z.m;
    for (int i = team.rank; i < n; i += team.size) v.x_o[i] = scale.d[i] * x[i];
    for (int e = team.rank; e < p; e += team.size) v.eq_o[e] = scale.rows[e] * nu[e] / scale.cost;
    for (int k = team.rank; k < m; k += team.size) v.lam_o[k] = scale.rows[p + k] * force[k] / scale.cost;
    team.sync();
    times(team, data.Q, n, n, n, v.x_o, v.Qx);
    times(team, data.A, p, n, n, v.x_o, v.Ax);
    times(team, data.G, m, n, n, v.x_o, v.Gx);
    times_transposed(team, data.Q, n, n, n, v.x_o, v.push);
    for (int i = team.rank; i < n; i += team.size) v.Qx[i] = 0.5 * (v.Qx[i] + v.push[i]);
    team.sync();  // v.push changes its meaning
    times_transposed(team, data.A, p, n, n, v.eq_o, v.pull);
    times_transposed(team, data.G, m, n, n, v.lam_o, v.push);
    if (z.c > m) {
        for (int i = team.rank; i < n; i += team.size) v.push[i] += force[m + i] / (scale.cost * scale.d[i]);
    }
    team.sync();
}

}  // namespace diffopt
