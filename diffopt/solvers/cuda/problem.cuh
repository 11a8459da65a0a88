// The data of a batch, the sizes of its problems, and equilibration.
#pragma once
#include "dense.cuh"

namespace diffopt {

// The arguments of the forward kernel: 8 bytes each, in this order. A stride is in numbers, 0 for what the batch shares.
// lower and upper are null where there are none. `kept`: `Kept::size` doubles, and `lists`: c + 1 ints, for each instance
// if `keep`, else for each team, which then has them for one instance after the other. `workspace`: `Memory::far` doubles
// a team. counts: iterations, weakly active rows and dependent rows, each of length batch; residuals: primal, dual, gap,
// likewise. `tolerance` is that of the iteration, in float64, and `claim` that of the answer as written, rounded to T.
// `unsolved` counts what is left to others.
#define DIFFOPT_FORWARD_ARGUMENTS(T, _)                                                                              \
    _(const T*, Q) _(long long, Q_stride) _(const T*, q) _(long long, q_stride)                                      \
    _(const T*, A) _(long long, A_stride) _(const T*, b) _(long long, b_stride)                                      \
    _(const T*, G) _(long long, G_stride) _(const T*, h) _(long long, h_stride)                                      \
    _(const T*, lower) _(long long, lower_stride) _(const T*, upper) _(long long, upper_stride)                      \
    _(long long, n) _(long long, p) _(long long, m) _(long long, batch)                                              \
    _(double*, kept) _(int*, lists) _(long long, keep) _(double*, workspace)                                         \
    _(T*, x) _(T*, s) _(T*, lam) _(T*, nu) _(T*, lam_lower) _(T*, lam_upper)                                         \
    _(signed char*, status) _(long long*, counts) _(double*, residuals) _(int*, unsolved)                            \
    _(long long, max_iterations) _(double, tolerance) _(double, claim) _(double, weak_tolerance)

// Those of the backward kernel. Of the incoming gradients, g_x to g_upper, and of the results, null is not there. `others`:
// whether what was left unsolved is somebody else's to differentiate, too; if not, it has failed.
// vectors: y_x, y_eq, dh, lam of the active rows, x and nu, one row of n + p + 2m + n + p doubles an instance.
#define DIFFOPT_BACKWARD_ARGUMENTS(T, _)                                                                             \
    _(const T*, Q) _(long long, Q_stride) _(const T*, A) _(long long, A_stride)                                      \
    _(const T*, G) _(long long, G_stride) _(const T*, h) _(long long, h_stride)                                      \
    _(long long, bounded) _(long long, n) _(long long, p) _(long long, m) _(long long, batch)                        \
    _(const double*, kept) _(const int*, lists) _(long long, others)                                                 \
    _(const T*, g_x) _(const T*, g_s) _(const T*, g_lam) _(const T*, g_nu) _(const T*, g_lower) _(const T*, g_upper) \
    _(T*, dQ) _(T*, dq) _(T*, dA) _(T*, db) _(T*, dG) _(T*, dh) _(T*, dlower) _(T*, dupper) _(double*, vectors)

#define DIFFOPT_FIELD(type, name) type name;

template <class T>
struct Forward {
    DIFFOPT_FORWARD_ARGUMENTS(T, DIFFOPT_FIELD)
};

template <class T>
struct Backward {
    DIFFOPT_BACKWARD_ARGUMENTS(T, DIFFOPT_FIELD)
};

// A side that is not there.
__device__ inline bool present(double side) { return finite(side); }

// Sizes. Constraints come in directions: first p equalities, then c directions of inequalities: the rows of G, and where
// there are bounds one for each variable. A direction has one row (of G, or a bound) or two (a lower and an upper bound):
// the rows, as in the torch executor, are those of G, then lower bounds, then upper bounds.
struct Sizes {
    int n, p, m, c, all, ld, rows;
    bool lower, upper;

    __host__ __device__ Sizes(int n, int p, int m, bool lower, bool upper)
        : n(n), p(p), m(m), c(m + (lower || upper ? n : 0)), all(p + c),
          ld(all | 1),  // odd: threads of consecutive rows of V then meet different banks
          rows(m + (lower ? n : 0) + (upper ? n : 0)), lower(lower), upper(upper) {}

    // Call f(row, sign) for each row of direction k: it reads sign * (direction's value) <= its side.
    template <class F>
    __device__ void each_row(int k, F f) const {
        if (k < m) {
            f(k, 1.0);
        } else {
            if (lower) f(k, -1.0);
            if (upper) f(k + (lower ? n : 0), 1.0);
        }
    }

    // Numbers in the first p columns of a packed matrix of all directions.
    __host__ __device__ int eliminated() const { return p * all - p * (p - 1) / 2; }
};

// What stays of one instance for its polish and its backward pass, in global memory.
//   L     factor of Q                     E   the p eliminated columns: factor of the equalities, and all else by it
//   V     L^-1 [A' C'], n rows of ld      K   factor of the reduced matrix of the active directions
//   d, rows, cost   scaling (rows: p equalities, then m rows of G); x, nu, lam in original units, lam of active rows only
// lists: the number of active directions, -1 where there is no answer; then for each 2 k, or 2 k + 1 where a lower bound
// is active.
struct Kept {
    double *L, *V, *E, *K, *d, *rows, *cost, *x, *nu, *lam;
    int* list;

    __host__ __device__ static long long size(const Sizes& z) {
        return (long long)triangle(z.n) + z.n * z.ld + z.eliminated() + triangle(z.c) + 2 * z.n + 2 * z.p + 2 * z.m + 1;
    }
    __device__ Kept(const Sizes& z, double* kept, int* lists, long long i) {
        double* at = kept + i * size(z);
        auto take = [&at](int count) {
            double* start = at;
            at += count;
            return start;
        };
        L = take(triangle(z.n));
        V = take(z.n * z.ld);
        E = take(z.eliminated());
        K = take(triangle(z.c));
        d = take(z.n);
        rows = take(z.p + z.m);
        cost = take(1);
        x = take(z.n);
        nu = take(z.p);
        lam = take(z.m);
        list = lists + i * (z.c + 1);
    }
};

// One instance's data, in original units and their own dtype.
template <class T>
struct Instance {
    const T *Q, *q, *A, *b, *G, *h, *lower, *upper;

    __device__ Instance(const Forward<T>& f, long long i)
        : Q(f.Q + i * f.Q_stride), q(f.q + i * f.q_stride), A(f.A + i * f.A_stride), b(f.b + i * f.b_stride),
          G(f.G + i * f.G_stride), h(f.h + i * f.h_stride), lower(f.lower ? f.lower + i * f.lower_stride : nullptr),
          upper(f.upper ? f.upper + i * f.upper_stride : nullptr) {}

    // Only what the backward pass needs.
    __device__ Instance(const Backward<T>& f, long long i)
        : Q(f.Q + i * f.Q_stride), q(nullptr), A(f.A + i * f.A_stride), b(nullptr), G(f.G + i * f.G_stride),
          h(f.h + i * f.h_stride), lower(nullptr), upper(nullptr) {}
};

// The change of units x = d x^, rows of [A; G] times `rows`, objective times cost. All are powers of two: scaling
// rounds nothing. Duals: nu = rows nu^ / cost, lam likewise, and for bounds lam = lam^ / (cost d).
struct Scaling {
    double *d, *rows, cost;
};

__device__ inline double inverse_root(double norm) { return norm > 0 && finite(norm) ? 1.0 / sqrt(norm) : 1.0; }

__device__ inline double power_of_two(double v, int step) {
    return v > 0 && finite(v) ? exp2(rint(log2(v) / step) * step) : 1.0;
}

// Find the scaling by the passes of diffopt/linalg/scaling.py, so that active sets and statuses agree with it.
// Q: its symmetric part; V: [A' G'], unscaled. Scratch: by_x and norm (n), by_row (p + m).
// Reference: Ruiz (2001), with the largest magnitude as norm.
template <class Team>
DIFFOPT_STEP void equilibrate(
    const Team& team, const Sizes& z, const Packed& Q, const double* V, Scaling& scale, double* by_x, double* norm,
    double* by_row) {
    const int n = z.n, rows = z.p + z.m, passes = 6;
    for (int j = team.rank; j < n; j += team.size) {
        norm[j] = 0;
        for (int i = 0; i < n; ++i) norm[j] = fmax(norm[j], fabs(i >= j ? Q(i, j) : Q(j, i)));
        scale.d[j] = 1;
    }
    for (int e = team.rank; e < rows; e += team.size) scale.rows[e] = 1;
    team.sync();
    for (int pass = 0; pass < passes; ++pass) {
        for (int e = team.rank; e < rows; e += team.size) {
            double most = 0;
            for (int k = 0; k < n; ++k) most = fmax(most, scale.rows[e] * fabs(V[k * z.ld + e]) * scale.d[k]);
            by_row[e] = inverse_root(most);
        }
        for (int k = team.rank; k < n; k += team.size) {
            double most = scale.d[k] * norm[k] * scale.d[k];
            for (int e = 0; e < rows; ++e) most = fmax(most, scale.rows[e] * fabs(V[k * z.ld + e]) * scale.d[k]);
            by_x[k] = inverse_root(most);
        }
        team.sync();  // everyone has read the old factors
        for (int e = team.rank; e < rows; e += team.size) scale.rows[e] *= by_row[e];
        for (int k = team.rank; k < n; k += team.size) scale.d[k] *= by_x[k];
        team.sync();
    }
    for (int e = team.rank; e < rows; e += team.size) scale.rows[e] = power_of_two(scale.rows[e], 1);
    for (int k = team.rank; k < n; k += team.size) scale.d[k] = power_of_two(scale.d[k], 1);
    team.sync();
    double largest[1] = {0};
    for (int j = team.rank; j < n; j += team.size) {
        for (int i = j; i < n; ++i) largest[0] = fmax(largest[0], scale.d[i] * fabs(Q(i, j)) * scale.d[j]);
    }
    team.max(largest);
    scale.cost = power_of_two(1 / largest[0], 2);
}

}  // namespace diffopt
