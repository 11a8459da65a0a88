// What depends on the matrices alone: equilibration, Q = U'U, and the reduced matrix of the dual form.
#pragma once
#include "batch.hpp"
#include "dense.hpp"
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

    explicit Setup(const Batch& batch) : k(batch) {}

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
        if (batch.single) read<float>(batch, first);
        else read<double>(batch, first);
        equilibrate();
        factor();
    }

  private:
    template <class T> void read(const Batch& batch, Index first) {
        const Index ldc = k.pp + k.mp;
        for (int lane = 0; lane < P::S; lane++) {
            const Index i = first + lane < batch.count ? first + lane : batch.count - 1;
            const T* source = batch.at<T>(FIELD_Q, i);
            symmetrise(source, Q + lane);
            transpose(batch.at<T>(FIELD_A, i), k.p, C + lane, ldc);
            transpose(batch.at<T>(FIELD_G, i), k.m, C + k.pp * P::S + lane, ldc);
        }
    }

    // By blocks of 8 x 8, so that both halves are read along cache lines.
    template <class T> void symmetrise(const T* source, double* target) const {
        for (Index r0 = 0; r0 < k.n; r0 += 8)
            for (Index c0 = 0; c0 <= r0; c0 += 8)
                for (Index r = r0; r < r0 + 8 && r < k.n; r++)
                    for (Index c = c0; c < c0 + 8 && c <= r; c++) {
                        const double v = 0.5 * (static_cast<double>(source[r * k.n + c]) + static_cast<double>(source[c * k.n + r]));
                        target[(r * k.np + c) * P::S] = target[(c * k.np + r) * P::S] = v;
                    }
    }

    template <class T> void transpose(const T* source, Index count, double* target, Index ld) const {
        for (Index r0 = 0; r0 < count; r0 += 8)
            for (Index c = 0; c < k.n; c++)
                for (Index r = r0; r < r0 + 8 && r < count; r++)
                    target[(c * ld + r) * P::S] = static_cast<double>(source[r * k.n + c]);
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
        for (int l = 0; l < P::S; l++) P::set_lane(cost, l, power_of_four(1 / P::lane(cost, l)));
        for (Index r = 0; r < k.n; r++)
            for (Index q = 0; q < qn; q++) {
                double* entry = Q + r * k.np * P::S + q * P::W;
                P::store(entry, P::load(entry) * P::splat(cost));
            }
        sound = P::sum(finite) == 0.0;
    }

    static INLINE Vec inverse_root(Vec norm) {
        return select((norm > 0.0) & (norm < INF), 1.0 / vsqrt(norm), P::splat(1.0));  // a zero row has no size to correct
    }

    void factor() {
        const Index ldc = k.pp + k.mp, first_bound = k.packs(ldc);
        auto pivots = cholesky<P>(Q, k.np, nullptr, U, k.np, k.n, inv);
        sound = sound & pivots.positive & (pivots.smallest * SAFE_CONDITION >= pivots.largest);
        for (Index r = 0; r < k.n; r++) {
            std::memcpy(V + r * k.joint * P::S, C + r * ldc * P::S, static_cast<std::size_t>(ldc * P::S) * sizeof(double));
            std::memset(V + (r * k.joint + ldc) * P::S, 0, static_cast<std::size_t>(k.bp * P::S) * sizeof(double));
            if (k.b) P::put(V + r * k.joint * P::S, ldc + r, Number{} + 1.0);
        }
        // The column of a bound on x_i is zero above row i.
        auto start = [&](Index q) { return q < first_bound ? 0 : (q - first_bound) * P::E; };
        solve_transposed<P>(U, k.np, inv, k.n, V, k.joint, 0, k.packs(k.joint), start);
        gram<P, false>(V, k.joint, k.n, k.joint, nullptr, 0, D, k.joint, start);
        const double* D_cc = D + (k.pp * k.joint + k.pp) * P::S;
        const Index qc = k.packs(k.directions);
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
