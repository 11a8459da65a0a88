// What depends on the matrices alone: equilibration, Q = U'U, and the reduced matrix of the dual form.
#pragma once
#include "batch.hpp"
#include "dense.hpp"
#include "interleave.hpp"
#include "limits.hpp"

namespace diffopt {

// Directions are what constraints measure: rows of G, then (if any variable is bounded) the variables themselves.
// All constraint rows together, equalities first, are "joint". Every section is padded to whole packs.
template <class P> struct Shape {
    Index n, p, m, b;          // b: n if there are bounds, else 0
    Index np, pp, mp, bp;      // padded
    Index directions, joint;   // mp + bp, pp + mp + bp
    explicit Shape(const Batch& batch)
        : n(batch.n), p(batch.p), m(batch.m), b(batch.bounds()), np(padded<P>(n)), pp(padded<P>(p)), mp(padded<P>(m)),
          bp(padded<P>(b)), directions(mp + bp), joint(pp + mp + bp) {}
    static Index packs(Index padded_size) { return padded_size / P::E; }
};

template <class P> struct Setup {
    using Vec = typename P::Vec;
    using Mask = typename P::Mask;
    using Number = typename P::Number;
    using Flag = typename P::Flag;
    Shape<P> k;
    double *Q, *U, *inv;           // n x np: Q in equilibrated units, its factor, 1 / diagonal of the factor
    double *C;                     // n x (pp + mp): columns are the rows of A, then of G
    double *V;                     // n x joint: U^-T times all rows, bounds too
    double *D;                     // joint x joint, upper: V'V
    double *E, *inv_e, *H;         // the equalities' factor; H = E^-T D_ec
    double *R;                     // directions x directions, upper: D_cc - H'H
    double *d, *eq, *rows, *norms; // scaling of x, equalities, rows; scratch
    Number cost;
    Flag sound;                    // Q is safely positive definite, equalities are independent, all is finite

    explicit Setup(const Batch& batch) : k(batch) {
        for (Index e = 0; P::LANES && e < std::max(k.p, k.m) * k.n; e++)
            places_.push_back((e % k.n * (k.pp + k.mp) + e / k.n) * P::W);
    }

    void plan(Arena& arena) {
        const Index S = P::S;
        Q = arena.take(k.n * k.np * S);
        U = arena.take(k.n * k.np * S);
        inv = arena.take(k.np * S);
        C = arena.take(k.n * (k.pp + k.mp) * S);
        V = arena.take(k.n * k.joint * S);
        D = arena.take(k.joint * k.joint * S);
        E = arena.take(k.p * k.pp * S);
        inv_e = arena.take(k.pp * S);
        H = arena.take(k.p * k.directions * S);
        R = arena.take(k.directions * k.directions * S);
        d = arena.take(k.np * S);
        eq = arena.take(k.pp * S);
        rows = arena.take(k.mp * S);
        norms = arena.take(2 * (k.np + k.pp + k.mp) * S);
    }

    void build(const Batch& batch, Index first) {
        PROFILE(READ, 0, P::S * 8 * (square(k.n) + product(k.p + k.m, k.n)));
        if (batch.single) read<float>(batch, first);
        else read<double>(batch, first);
        PROFILE_THEN(EQUILIBRATE, 0);
        equilibrate();
        PROFILE_THEN(FACTOR_Q, P::S * cube(k.n) / 3);
        factor();
    }

  private:
    std::vector<Index> places_;  // lanes: where the entries of A and of G go in C

    template <class T> void read(const Batch& batch, Index first) {
        const Index ldc = k.pp + k.mp;
        const Each<P, const T> from_Q = each<P, T>(batch, FIELD_Q, first), from_A = each<P, T>(batch, FIELD_A, first),
                               from_G = each<P, T>(batch, FIELD_G, first);
        if constexpr (P::LANES) {
            to_lanes<P, T>(from_Q, k.n * k.n, [&](Index e, Vec v) { P::store(Q + e * P::W, v); });
            for (Index r = 0; r < k.n; r++)
                for (Index c = 0; c < r; c++) {
                    double *below = Q + (r * k.n + c) * P::W, *above = Q + (c * k.n + r) * P::W;
                    const Vec v = 0.5 * (P::load(below) + P::load(above));
                    P::store(below, v), P::store(above, v);
                }
            auto transposed = [&](const Each<P, const T>& from, Index count, double* target) {
                to_lanes<P, T>(from, count * k.n, [&](Index e, Vec v) { P::store(target + places_[static_cast<std::size_t>(e)], v); });
            };
            transposed(from_A, k.p, C);
            transposed(from_G, k.m, C + k.pp * P::S);
        } else {
            // By squares of W x W, so that both halves are read along cache lines.
            squares(k.n, k.n, [&](Index r, Index c) {
                if (c > r) return;
                Vec a[W], b[W];
                load_square(from_Q[0], k.n, k.n, r, c, a);
                load_square(from_Q[0], k.n, k.n, c, r, b);
                transpose(b);
                for (int i = 0; i < W; i++) a[i] = 0.5 * (a[i] + b[i]);
                store_square(Q, k.np, k.n, r, c, a);
                transpose(a);
                store_square(Q, k.np, k.n, c, r, a);
            });
            auto transposed = [&](const T* from, Index count, double* target) {
                squares(count, k.n, [&](Index r, Index c) {
                    Vec a[W];
                    load_square(from, count, k.n, r, c, a);
                    transpose(a);
                    store_square(target, ldc, k.n, c, r, a);
                });
            };
            transposed(from_A[0], k.p, C);
            transposed(from_G[0], k.m, C + k.pp);
        }
    }

    // As diffopt.linalg.scaling.equilibrate: Ruiz passes in the largest magnitude, then powers of two.
    void equilibrate() {
        const Index ldc = k.pp + k.mp, qn = k.packs(k.np), qp = k.packs(k.pp), qc = k.packs(ldc);
        double *hessian = norms, *column = norms + k.np * P::S, *scale = norms + 2 * k.np * P::S,
               *largest = scale + ldc * P::S;
        Vec finite{};  // stays zero only if nothing is infinite or NaN
        for (Index q = 0; q < qn; q++) {
            for (Index r = 0; r < k.n; r++) finite += P::load(Q + r * k.np * P::S + q * P::W) * 0.0;
            P::store(hessian + q * P::W, Vec{});
            P::store(d + q * P::W, P::splat(1.0));
        }
        for (Index j = 0; j < k.n; j++) P::put(hessian, j, vabs(P::get(Q + j * k.np * P::S, j)));
        for (Index q = 0; q < qc; q++) P::store(scale + q * P::W, P::splat(1.0));
        for (int pass = 0; pass < EQUILIBRATION_PASSES; pass++) {
            for (Index q = 0; q < qc; q++) P::store(largest + q * P::W, Vec{});
            for (Index j = 0; j < k.n; j++) {
                const Vec dj = P::splat(P::get(d, j));
                Vec most{};
                for (Index q = 0; q < qc; q++) {
                    const Vec x = P::load(C + j * ldc * P::S + q * P::W);
                    if (pass == 0) finite += x * 0.0;
                    const Vec v = vabs(x) * dj * P::load(scale + q * P::W);
                    P::store(largest + q * P::W, vmax(v, P::load(largest + q * P::W)));
                    most = vmax(v, most);
                }
                P::put(column, j, P::max(most));
            }
            for (Index q = 0; q < qc; q++)
                P::store(scale + q * P::W, P::load(scale + q * P::W) * inverse_root(P::load(largest + q * P::W)));
            for (Index q = 0; q < qn; q++) {
                const Vec dq = P::load(d + q * P::W), own = dq * P::load(hessian + q * P::W) * dq;
                P::store(d + q * P::W, dq * inverse_root(vmax(own, P::load(column + q * P::W))));
            }
        }
        for (Index q = 0; q < qn; q++) P::store(d + q * P::W, power_of_two(P::load(d + q * P::W)));
        for (Index q = 0; q < qp; q++) P::store(eq + q * P::W, power_of_two(P::load(scale + q * P::W)));
        for (Index q = 0; q < k.packs(k.mp); q++) P::store(rows + q * P::W, power_of_two(P::load(scale + (qp + q) * P::W)));

        Vec most{};
        for (Index r = 0; r < k.n; r++) {
            const Vec dr = P::splat(P::get(d, r));
            for (Index q = 0; q < qn; q++) {
                double* entry = Q + r * k.np * P::S + q * P::W;
                const Vec v = P::load(entry) * dr * P::load(d + q * P::W);
                P::store(entry, v);
                most = vmax(vabs(v), most);
            }
            for (Index q = 0; q < qc; q++) {
                double* entry = C + r * ldc * P::S + q * P::W;
                P::store(entry, P::load(entry) * dr * P::load(q < qp ? eq + q * P::W : rows + (q - qp) * P::W));
            }
        }
        cost = P::max(most);
        cost = power_of_four(1.0 / cost);
        for (Index r = 0; r < k.n; r++)
            for (Index q = 0; q < qn; q++) {
                double* entry = Q + r * k.np * P::S + q * P::W;
                P::store(entry, P::load(entry) * P::splat(cost));
            }
        sound = P::sum(finite) == 0.0;
    }

    static INLINE Vec inverse_root(Vec norm) {
        return select((norm > 0.0) & (norm < INF), rough_inverse_root(norm), P::splat(1.0));  // a zero row has no size
    }

    void factor() {
        const Index ldc = k.pp + k.mp, first_bound = k.packs(ldc);
        auto pivots = cholesky<P>(Q, k.np, nullptr, U, k.np, k.n, inv);
        sound = sound & pivots.positive & (pivots.smallest * SAFE_CONDITION >= pivots.largest);
        PROFILE_THEN(ROWS, P::S * product(k.n, k.n) * (k.p + k.m + k.b));
        for (Index r = 0; r < k.n; r++) {
            std::memcpy(V + r * k.joint * P::S, C + r * ldc * P::S, static_cast<std::size_t>(ldc * P::S) * sizeof(double));
            std::memset(V + (r * k.joint + ldc) * P::S, 0, static_cast<std::size_t>(k.bp * P::S) * sizeof(double));
            if (k.b) P::put(V + r * k.joint * P::S, ldc + r, Number{} + 1.0);
        }
        // The column of a bound on x_i is zero above row i.
        auto start = [&](Index q) { return q < first_bound ? 0 : (q - first_bound) * P::E; };
        solve_transposed<P>(U, k.np, inv, k.n, V, k.joint, 0, k.packs(k.joint), start);
        PROFILE_THEN(REDUCE, P::S * square(k.p + k.m + k.b) * k.n);
        gram<P, false>(V, k.joint, k.n, k.joint, nullptr, 0, D, k.joint, start);
        const double* D_cc = D + (k.pp * k.joint + k.pp) * P::S;
        const Index qc = k.packs(k.directions);
        PROFILE_THEN(EQUALITIES, P::S * (cube(k.p) / 3 + square(k.p) * (k.m + k.b) + square(k.m + k.b) * k.p));
        if (k.p) {
            pivots = cholesky<P>(D, k.joint, nullptr, E, k.pp, k.p, inv_e);
            sound = sound & pivots.positive & (pivots.smallest >= DEPENDENT);
            for (Index r = 0; r < k.p; r++)
                std::memcpy(H + r * k.directions * P::S, D + (r * k.joint + k.pp) * P::S,
                            static_cast<std::size_t>(k.directions * P::S) * sizeof(double));
            auto all = [](Index) { return Index{0}; };
            solve_transposed<P>(E, k.pp, inv_e, k.p, H, k.directions, 0, qc, all);
            gram<P, true>(H, k.directions, k.p, k.directions, D_cc, k.joint, R, k.directions, all);
        } else {
            for (Index r = 0; r < k.directions; r++)
                std::memcpy(R + r * k.directions * P::S, D_cc + r * k.joint * P::S,
                            static_cast<std::size_t>(k.directions * P::S) * sizeof(double));
        }
    }
};

}  // namespace diffopt
