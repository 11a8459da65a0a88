// Dense linear algebra on matrices stored by rows, each row padded to whole packs (padding is zero).
//
// All of it rests on one register tile: entries (k, i..i+R) of one matrix times packs of row k of another, summed
// over k. Factors are upper: S = U'U, row j of U computed from the rows above it, with the pack running along the row.
#pragma once
#include "simd.hpp"

namespace diffopt {

// acc[r][c] (-)= sum over k0 <= k < k1 of A(k, i + r) * B(k, pack q + c)
template <class P, bool MINUS, int R, int C>
INLINE void tile(typename P::Vec (&acc)[R][C], const double* A, Index lda, Index i, const double* B, Index ldb, Index q, Index k0,
                 Index k1) {
    using Vec = typename P::Vec;
    const double* a = A + (k0 * lda + i) * P::S;
    const double* b = B + k0 * ldb * P::S + q * P::W;
    for (Index count = k1 - k0; count > 0; count--, a += lda * P::S, b += ldb * P::S) {
        Vec row[C];
        for (int c = 0; c < C; c++) row[c] = P::load(b + c * P::W);
        for (int r = 0; r < R; r++) {
            const Vec x = P::splat(P::get(a, r));
            for (int c = 0; c < C; c++) acc[r][c] = MINUS ? fnma(x, row[c], acc[r][c]) : fma(x, row[c], acc[r][c]);
        }
    }
}

// Rows of a tile. (Eight would fill AVX-512 better, but their corner, which is serial, costs more than that gains.)
constexpr int BLOCK = 4;

template <int N> using Constant = std::integral_constant<int, N>;

// Calls f(R, C, row, pack) for tiles that cover packs [q0, q1) of the R rows at i.
template <int R, class F> INLINE void row_tiles(Index i, Index q0, Index q1, const F& f) {
    Index q = q0;
    for (; q + 3 <= q1; q += 3) f(Constant<R>{}, Constant<3>{}, i, q);
    if (q1 - q == 2) f(Constant<R>{}, Constant<2>{}, i, q);
    if (q1 - q == 1) f(Constant<R>{}, Constant<1>{}, i, q);
}
// Calls f(R, row) for blocks of rows that cover [0, n), the largest first.
template <class F> INLINE void row_blocks(Index n, const F& f) {
    Index i = 0;
    for (; i + BLOCK <= n; i += BLOCK) f(Constant<BLOCK>{}, i);
    if (BLOCK > 4 && n - i >= 4) f(Constant<4>{}, i), i += 4;
    if (n - i >= 2) f(Constant<2>{}, i), i += 2;
    if (n - i == 1) f(Constant<1>{}, i);
}
// The same blocks, from the last to the first.
template <class F> INLINE void row_blocks_reversed(Index n, const F& f) {
    Index i = n;
    if (i % 2) f(Constant<1>{}, i -= 1);
    if (i % 4) f(Constant<2>{}, i -= 2);
    if (BLOCK > 4 && i % BLOCK) f(Constant<4>{}, i -= 4);
    while (i > 0) f(Constant<BLOCK>{}, i -= BLOCK);
}

// Where the rows of a matrix lie: row j at (j), the next ones of its block step(j) further each.
template <class P> struct WholeRows {
    const double* base;
    Index ld;
    const double* operator()(Index j) const { return base + j * ld * P::S; }
    Index step(Index) const { return ld; }
};

// An upper triangle without most of what is left of its diagonal: row r begins at the column that solves read first.
struct PackedRows {
    static constexpr Index T = W > BLOCK ? W : BLOCK;
    double* base;
    Index ld;
    static Index first(Index r) { return r / T * T; }
    Index step(Index r) const { return ld - first(r); }
    // (Row pointers are those of a full row, of which only columns from first(r) on may be used.)
    double* operator()(Index r) const {
        const Index q = r / T;
        return base + q * T * ld - T * T * q * (q - 1) / 2 + (r - q * T) * step(r) - first(r);
    }
    static Index size(Index rows, Index ld) {
        const Index q = rows / T;
        return q * T * ld - T * T * q * (q - 1) / 2 + (rows - q * T) * (ld - q * T);
    }
};

// The R x R upper triangle at (j, j) of U, in registers or scalars.
template <class P, int R> struct Corner {
    using Vec = typename P::Vec;
    typename P::Number u[R][R], inverse[R];
    // `row` is row j.
    INLINE void read(const double* row, Index ld, Index j, const double* inv) {
        for (int r = 0; r < R; r++) {
            for (int t = r + 1; t < R; t++) u[r][t] = P::get(row + r * ld * P::S, j + t);
            inverse[r] = P::get(inv, j + r);
        }
    }
    // Solves U' y = v for the corner, on C packs at once.
    template <int C> INLINE void solve_transposed(Vec (&v)[R][C]) const {
        for (int r = 0; r < R; r++) {
            for (int t = 0; t < r; t++)
                for (int c = 0; c < C; c++) v[r][c] = fnma(P::splat(u[t][r]), v[t][c], v[r][c]);
            for (int c = 0; c < C; c++) v[r][c] *= P::splat(inverse[r]);
        }
    }
};

template <class P> struct Pivots {
    typename P::Flag positive;             // all pivots were: the factor exists
    typename P::Number smallest, largest;  // pivots, squares of U's diagonal
};

// U'U = S + diag(extra), upper, zeros below the diagonal. `extra` may be null; U may be S. inv: 1 / diagonal.
template <class P>
Pivots<P> cholesky(const double* S, Index lds, const double* extra, double* U, Index ld, Index n, double* inv) {
    using Number = typename P::Number;
    using Vec = typename P::Vec;
    Pivots<P> pivots{none_of(typename P::Flag{}), Number{} + INF, Number{}};
    const Index packs = padded<P>(n) / P::E;
    row_blocks(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        // The packs that hold the corner. (Blocks are aligned: a corner never straddles packs that it could fit in.)
        constexpr int CORNER = R > P::E ? R / P::E : 1;
        const Index q0 = j / P::E;
        double* const row = U + j * ld * P::S;
        Corner<P, R> corner;
        auto accumulate = [&](auto& acc, Index q, auto count) {
            constexpr int C = decltype(count)::value;
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) acc[r][c] = P::load(S + (j + r) * lds * P::S + (q + c) * P::W);
            tile<P, true, R, C>(acc, U, ld, j, U, ld, q, 0, j);
        };
        auto finish = [&](auto& acc, Index q, auto count) {
            constexpr int C = decltype(count)::value;
            corner.template solve_transposed<C>(acc);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) P::store(row + r * ld * P::S + (q + c) * P::W, acc[r][c]);
        };
        // The first tile holds the corner: to memory, factored from there, and the rest of the tile waits in registers.
        auto first = [&](auto count) {
            constexpr int C = decltype(count)::value;
            Vec acc[R][C];
            accumulate(acc, q0, count);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < CORNER; c++) P::store(row + r * ld * P::S + (q0 + c) * P::W, acc[r][c]);
            for (int r = 0; r < R; r++) {
                for (int t = r; t < R; t++) corner.u[r][t] = P::get(row + r * ld * P::S, j + t);
                if (extra) corner.u[r][r] += P::get(extra, j + r);
            }
            for (int r = 0; r < R; r++) {
                const Number pivot = corner.u[r][r];
                const auto good = (pivot > 0.0) & (pivot < INF);
                pivots.positive = pivots.positive & good;
                pivots.smallest = vmin(pivot, pivots.smallest);
                pivots.largest = vmax(pivot, pivots.largest);
                corner.u[r][r] = select(good, pivot, Number{} + 1.0);  // a failed problem stays finite
                // Roots are slow, so they are kept out of the chain from pivot to pivot.
                const Number inverse = 1.0 / corner.u[r][r];
                corner.inverse[r] = inverse;
                for (int t = r + 1; t < R; t++) {
                    const Number factor = corner.u[r][t] * inverse;
                    for (int c = t; c < R; c++) corner.u[t][c] = fnma(factor, corner.u[r][c], corner.u[t][c]);
                }
            }
            for (int r = 0; r < R; r++) {
                corner.inverse[r] = vsqrt(corner.inverse[r]);
                corner.u[r][r] *= corner.inverse[r];
                P::put(inv, j + r, corner.inverse[r]);
                for (int t = r + 1; t < R; t++) corner.u[r][t] *= corner.inverse[r];
            }
            finish(acc, q0, count);
            for (int r = 0; r < R; r++) {
                for (Index i = q0 * P::E; i < j + r; i++) P::put(row + r * ld * P::S, i, Number{});
                for (int t = r; t < R; t++) P::put(row + r * ld * P::S, j + t, corner.u[r][t]);
            }
        };
        Index q = q0 + CORNER;
        if (CORNER == 1 && packs - q0 >= 3) first(Constant<3>{}), q = q0 + 3;
        else if (CORNER == 1 && packs - q0 == 2) first(Constant<2>{}), q = q0 + 2;
        else first(Constant<CORNER>{});
        row_tiles<R>(j, q, packs, [&](auto, auto count, Index, Index at) {
            Vec acc[R][decltype(count)::value];
            accumulate(acc, at, count);
            finish(acc, at, count);
        });
        for (Index z = 0; z < q0; z++)
            for (int r = 0; r < R; r++) P::store(row + r * ld * P::S + z * P::W, Vec{});
    });
    return pivots;
}

// X <- U^-T X for the packs [q0, q1) of X. Column pack q is zero above row start(q).
template <class P, class Start>
void solve_transposed(const double* U, Index ldu, const double* inv, Index n, double* X, Index ldx, Index q0, Index q1,
                      Start start) {
    using Vec = typename P::Vec;
    row_blocks(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Corner<P, R> corner;
        corner.read(U + j * ldu * P::S, ldu, j, inv);
        row_tiles<R>(j, q0, q1, [&](auto, auto count, Index, Index q) {
            constexpr int C = decltype(count)::value;
            const Index k0 = start(q);
            if (k0 >= j + R) return;
            Vec acc[R][C];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) acc[r][c] = P::load(X + (j + r) * ldx * P::S + (q + c) * P::W);
            tile<P, true, R, C>(acc, U, ldu, j, X, ldx, q, k0 < j ? k0 : j, j);
            corner.template solve_transposed<C>(acc);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) P::store(X + (j + r) * ldx * P::S + (q + c) * P::W, acc[r][c]);
        });
    });
}

// D (+ or -)= X'X on and above the diagonal, for `rows` rows of X and `c` columns from entry i0 of X's rows on;
// packs of D's rows before the diagonal's are zeroed. Column pack q of X is zero above row start(q).
// With `from` null D is overwritten, else D = from -/+ X'X.
template <class P, bool MINUS, class Start>
void gram(const double* X, Index ldx, Index rows, Index c, const double* from, Index ldf, double* D, Index ldd,
          Start start) {
    using Vec = typename P::Vec;
    const Index packs = padded<P>(c) / P::E;
    row_blocks(c, [&](auto count_rows, Index i) {
        constexpr int R = decltype(count_rows)::value;
        row_tiles<R>(i, i / P::E, packs, [&](auto, auto count, Index, Index q) {
            constexpr int C = decltype(count)::value;
            Vec acc[R][C];
            for (int r = 0; r < R; r++)
                for (int k = 0; k < C; k++)
                    acc[r][k] = from ? P::load(from + (i + r) * ldf * P::S + (q + k) * P::W) : Vec{};
            tile<P, MINUS, R, C>(acc, X, ldx, i, X, ldx, q, start(q), rows);
            for (int r = 0; r < R; r++)
                for (int k = 0; k < C; k++) P::store(D + (i + r) * ldd * P::S + (q + k) * P::W, acc[r][k]);
        });
        for (int r = 0; r < R; r++) {
            for (Index q = 0; q < i / P::E; q++) P::store(D + (i + r) * ldd * P::S + q * P::W, Vec{});
            for (Index k = i / P::E * P::E; k < i + r; k++)
                P::put(D + (i + r) * ldd * P::S, k, typename P::Number{});
        }
    });
}

// b <- U^-T b, in place.
template <class P, class Rows> void solve_transposed(const Rows& U, const double* inv, Index n, double* b) {
    using Vec = typename P::Vec;
    using Number = typename P::Number;
    const Index packs = padded<P>(n) / P::E;
    row_blocks(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Number y[R];
        Corner<P, R> corner;
        const double* row = U(j);
        const Index ld = U.step(j);
        corner.read(row, ld, j, inv);
        for (int r = 0; r < R; r++) {
            y[r] = P::get(b, j + r);
            for (int t = 0; t < r; t++) y[r] = fnma(corner.u[t][r], y[t], y[r]);
            y[r] *= corner.inverse[r];
        }
        for (Index q = j / P::E; q < packs; q++) {
            Vec v = P::load(b + q * P::W);
            for (int r = 0; r < R; r++) v = fnma(P::splat(y[r]), P::load(row + r * ld * P::S + q * P::W), v);
            P::store(b + q * P::W, v);
        }
        for (int r = 0; r < R; r++) P::put(b, j + r, y[r]);  // U is zero left of its diagonal: no others were touched
    });
}

// b <- U^-1 b, in place.
template <class P, class Rows> void solve(const Rows& U, const double* inv, Index n, double* b) {
    using Vec = typename P::Vec;
    using Number = typename P::Number;
    const Index packs = padded<P>(n) / P::E;
    row_blocks_reversed(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Number y[R];
        Corner<P, R> corner;
        const double* row = U(j);
        const Index ld = U.step(j);
        corner.read(row, ld, j, inv);
        for (int r = 0; r < R; r++) {
            y[r] = P::get(b, j + r);
            P::put(b, j + r, Number{});
        }
        Vec acc[R] = {};
        for (Index q = j / P::E; q < packs; q++) {
            const Vec v = P::load(b + q * P::W);
            for (int r = 0; r < R; r++) acc[r] = fma(v, P::load(row + r * ld * P::S + q * P::W), acc[r]);
        }
        for (int r = R - 1; r >= 0; r--) {
            y[r] -= P::sum(acc[r]);
            for (int t = r + 1; t < R; t++) y[r] = fnma(corner.u[r][t], y[t], y[r]);
            y[r] *= corner.inverse[r];
        }
        for (int r = 0; r < R; r++) P::put(b, j + r, y[r]);
    });
}

template <class P> void solve_transposed(const double* U, Index ld, const double* inv, Index n, double* b) {
    solve_transposed<P>(WholeRows<P>{U, ld}, inv, n, b);
}
template <class P> void solve(const double* U, Index ld, const double* inv, Index n, double* b) {
    solve<P>(WholeRows<P>{U, ld}, inv, n, b);
}

// b <- (U'U)^-1 b, in place.
template <class P> void solve_both(const double* U, Index ld, const double* inv, Index n, double* b) {
    solve_transposed<P>(U, ld, inv, n, b);
    solve<P>(U, ld, inv, n, b);
}

// out (packs [q0, q1) of it) += sign * X' y over `rows` rows.
template <class P>
void add_transposed(const double* X, Index ld, Index rows, const double* y, double sign, double* out, Index q0, Index q1) {
    using Vec = typename P::Vec;
    row_blocks(rows, [&](auto count, Index k) {
        constexpr int R = decltype(count)::value;
        Vec f[R];
        for (int r = 0; r < R; r++) f[r] = P::splat(P::get(y, k + r)) * sign;
        const double* row = X + k * ld * P::S;
        for (Index q = q0; q < q1; q++) {
            Vec v = P::load(out + q * P::W);
            for (int r = 0; r < R; r++) v = fma(f[r], P::load(row + r * ld * P::S + q * P::W), v);
            P::store(out + q * P::W, v);
        }
    });
}

// out += sign * X y over packs [q0, q1) of y and of X's rows; out has `rows` entries.
template <class P>
void add_product(const double* X, Index ld, Index rows, const double* y, double sign, double* out, Index q0, Index q1) {
    using Vec = typename P::Vec;
    row_blocks(rows, [&](auto count, Index k) {
        constexpr int R = decltype(count)::value;
        Vec acc[R] = {};
        const double* row = X + k * ld * P::S;
        for (Index q = q0; q < q1; q++) {
            const Vec v = P::load(y + q * P::W);
            for (int r = 0; r < R; r++) acc[r] = fma(v, P::load(row + r * ld * P::S + q * P::W), acc[r]);
        }
        for (int r = 0; r < R; r++) P::put(out, k + r, P::get(out, k + r) + sign * P::sum(acc[r]));
    });
}

// out += sign * D y for a symmetric D of which the upper triangle is stored, zeros below it.
template <class P> void add_symmetric(const double* D, Index ld, Index n, const double* y, double sign, double* out) {
    using Vec = typename P::Vec;
    const Index packs = padded<P>(n) / P::E;
    row_blocks(n, [&](auto count, Index k) {
        constexpr int R = decltype(count)::value;
        typename P::Number mine[R];
        Vec f[R], acc[R] = {};
        const double* row = D + k * ld * P::S;
        for (int r = 0; r < R; r++) {
            mine[r] = P::get(y, k + r) * sign;
            f[r] = P::splat(mine[r]);
        }
        for (Index q = k / P::E; q < packs; q++) {
            const Vec v = P::load(y + q * P::W);
            Vec o = P::load(out + q * P::W);
            for (int r = 0; r < R; r++) {
                const Vec d = P::load(row + r * ld * P::S + q * P::W);
                acc[r] = fma(v, d, acc[r]);
                o = fma(f[r], d, o);
            }
            P::store(out + q * P::W, o);
        }
        for (int r = 0; r < R; r++)  // the diagonal was met twice
            P::put(out, k + r, P::get(out, k + r) + sign * P::sum(acc[r]) - P::get(row + r * ld * P::S, k + r) * mine[r]);
    });
}

}  // namespace diffopt
