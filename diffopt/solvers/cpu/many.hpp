// The derivative of a solution on many vectors at once: Jacobians, transposed (as pullback.hpp, without the gradients of
// matrices) or forward. A factor is read once, and its solves are products of matrices; or K is inverted (inverse.hpp),
// where all vectors are columns of an identity, as they are for a Jacobian.
//
// Forward, the vectors that come in are tangents of the conditions of optimality, K y = right: those of the gradient in
// place of x, of the sides b and h in place of nu and lam, of the bounds in place of their multipliers. What goes out are
// tangents of x, nu, lam and the bounds' multipliers, in place of dq, db, dh, dlower and dupper.
#pragma once
#include "inverse.hpp"

namespace diffopt {

// Which vectors belong together: number k of instance i is vector k * step_many + i * step_instance of each array.
struct Many {
    int64_t count, step_many, step_instance, forward;
    Index at(Index k, Index i) const { return k * step_many + i * step_instance; }
};

// sum[r][c] (-)= sum over k < count of A(k, r) * B(k, pack c), with A(k, r) at A + k * step_k + r * step_r.
template <bool MINUS, int R, int C>
INLINE void spaced_tile(Vec (&sum)[R][C], const double* A, Index step_k, Index step_r, const double* B, Index count) {
    // (A copy: compilers keep the original in memory throughout where it is indexed by variables later.)
    Vec acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = sum[r][c];
    for (; count > 0; count--, A += step_k, B += C * W) {
        Vec row[C];
        for (int c = 0; c < C; c++) row[c] = Wide::load(B + c * W);
        for (int r = 0; r < R; r++) {
            const Vec x = Wide::splat(A[r * step_r]);
            for (int c = 0; c < C; c++) acc[r][c] = MINUS ? fnma(x, row[c], acc[r][c]) : fma(x, row[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = acc[r][c];
}

// Panels are matrices of C packs, row by row without gaps; one column is one right-hand side.
template <int R, int C> INLINE void load_rows(Vec (&acc)[R][C], const double* panel, Index j) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = Wide::load(panel + ((j + r) * C + c) * W);
}
template <int R, int C> INLINE void store_rows(const Vec (&acc)[R][C], double* panel, Index j) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) Wide::store(panel + ((j + r) * C + c) * W, acc[r][c]);
}

// X <- U^-T X, for an X that is zero above row `start`.
template <int C> void panel_solve_transposed(const PackedRows& U, const double* inv, Index n, double* X, Index start) {
    row_blocks(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        if (j + R <= start) return;
        Vec acc[R][C];
        load_rows(acc, X, j);
        for (Index k = PackedRows::first(start); k < j; k += PackedRows::T)
            spaced_tile<true, R, C>(acc, U(k) + j, U.step(k), 1, X + k * C * W, std::min(PackedRows::T, j - k));
        Corner<Single, R> corner;
        corner.read(U(j), U.step(j), j, inv);
        corner.template solve_transposed<C>(acc);
        store_rows(acc, X, j);
    });
}

// X <- U^-1 X.
template <int C> void panel_solve(const PackedRows& U, const double* inv, Index n, double* X) {
    row_blocks_reversed(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Vec acc[R][C];
        load_rows(acc, X, j);
        spaced_tile<true, R, C>(acc, U(j) + j + R, 1, U.step(j), X + (j + R) * C * W, n - j - R);
        Corner<Single, R> corner;
        corner.read(U(j), U.step(j), j, inv);
        for (int r = R - 1; r >= 0; r--)
            for (int c = 0; c < C; c++) {
                for (int t = r + 1; t < R; t++) acc[r][c] = fnma(Wide::splat(corner.u[r][t]), acc[t][c], acc[r][c]);
                acc[r][c] *= corner.inverse[r];
            }
        store_rows(acc, X, j);
    });
}

constexpr Index WIDEST = 3;  // packs of a panel

// The right-hand sides `g[0], ...`, at most C * W of them; rx and ry are panels of n and of all held rows.
template <int C, class T> void many_by_factor(const HeldFactor& f, const Pull<T>* g, Index size, double* rx, double* ry) {
    constexpr Index ld = C * W;
    const Index n = f.n, p = f.p, m = f.m;
    std::fill_n(rx, n * ld, 0.0);
    std::fill_n(ry, f.count * ld, 0.0);
    Index start = n;
    std::vector<double> slack;
    for (Index k = 0; k < size; k++) {
        const Pull<T>& v = g[k];
        v.clear_vectors();
        Index first = 0;
        if (v.gs) {
            for (const Index at : f.place)
                if (at >= p && at < p + m) v.dh[at - p] = 1;
            slack.assign(static_cast<std::size_t>(n), 0.0);
            v.pass_slack(slack.data());
            for (Index j = 0; j < n; j++) rx[j * ld + k] = slack[static_cast<std::size_t>(j)];
        } else {
            for (; first < n && (!v.gx || v.gx[first] == 0);) first++;
        }
        start = std::min(start, first);
        for (Index j = first; j < n; j++) {
            rx[j * ld + k] = (rx[j * ld + k] + v.x_in(j)) * (f.cost * f.d[static_cast<std::size_t>(j)]);
        }
        for (Index j = 0; j < f.count; j++) {
            ry[j * ld + k] = -f.right(v, j);
        }
    }
    panel_solve_transposed<C>(f.U, f.inv_u.data(), n, rx, start);
    const Index from = std::min(start, n);
    row_blocks(f.count, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Vec acc[R][C];
        load_rows(acc, ry, j);
        spaced_tile<false, R, C>(acc, f.V + from * f.ldv + j, f.ldv, 1, rx + from * ld, n - from);
        store_rows(acc, ry, j);
    });
    panel_solve_transposed<C>(f.M, f.inv_m.data(), f.count, ry, 0);
    panel_solve<C>(f.M, f.inv_m.data(), f.count, ry);
    row_blocks(n, [&](auto rows, Index j) {
        constexpr int R = decltype(rows)::value;
        Vec acc[R][C];
        load_rows(acc, rx, j);
        spaced_tile<true, R, C>(acc, f.V + j * f.ldv, 1, f.ldv, ry, f.count);
        store_rows(acc, rx, j);
    });
    panel_solve<C>(f.U, f.inv_u.data(), n, rx);
    const double per_cost = 1 / f.cost;
    for (Index k = 0; k < size; k++) {
        const Pull<T>& v = g[k];
        const double sign = v.forward ? 1 : -1;
        for (Index j = 0; j < n; j++) v.dq[j] = static_cast<T>(sign * rx[j * ld + k] * f.d[static_cast<std::size_t>(j)]);
        for (Index j = 0; j < f.count; j++) f.pass(v, j, ry[j * ld + k] * per_cost);
    }
}

// Vectors [from, to) of instance i.
template <class T>
void pull_many(const Batch& batch, const Answer& answer, const Places& places, const Gradients& gradients, const Many& many,
               Index i, Index from, Index to, PullbackWork& work) {
    const double kind = *places.at(answer, i);
    auto vector = [&](Index k) {
        Pull<T> g(batch, answer, gradients, i, many.at(k, i));
        g.forward = many.forward != 0;
        return g;
    };
    // (Which way is taken must not depend on how the vectors are shared out: all are looked at, and all go one way.)
    if (kind >= 0) {
        std::vector<Entry> entries;
        for (Index k = 0; k < many.count; k++) {
            entries.push_back(only_entry(vector(k)));
            if (entries.back().kind == Entry::SEVERAL) break;
        }
        if (!entries.empty() && entries.back().kind != Entry::SEVERAL) {
            const HeldFactor factor(batch, answer, places, i);
            if (worth_inverting(factor, many.count)) {
                if (from > 0) return;
                const Inverse inverse(factor, entries, work.inverse);
                for (Index k = 0; k < many.count; k++) inverse.write(vector(k), entries[static_cast<std::size_t>(k)]);
                return;
            }
        }
    }
    std::vector<Pull<T>> asked;
    for (Index k = from; k < to; k++) {
        const Pull<T> g = vector(k);
        if (pull_nothing(g, kind)) continue;
        if (g.asked()) asked.push_back(g);
        else g.fill_all(T(0));
    }
    if (asked.empty()) return;
    if (kind == ONLY_SIDES) {
        const Sides sides(batch, places.at(answer, i), places.step(i));
        Reassembled& again = reassembled<T>(batch, i, sides, work);
        for (const Pull<T>& g : asked) {
            g.clear_vectors();
            work.poor |= !pull_by_sides(g, sides, again);
        }
        return;
    }
    const HeldFactor factor(batch, answer, places, i);
    const Index count = static_cast<Index>(asked.size());
    work.lanes.assign(static_cast<std::size_t>((factor.n + factor.count) * WIDEST * W), 0.0);
    double *rx = work.lanes.data(), *ry = rx + factor.n * WIDEST * W;
    for (Index k = 0; k < count;) {
        const Index left = count - k, packs = std::min(WIDEST, (left + W - 1) / W), size = std::min(left, packs * W);
        const Pull<T>* g = asked.data() + k;
        if (packs == 3) many_by_factor<3>(factor, g, size, rx, ry);
        else if (packs == 2) many_by_factor<2>(factor, g, size, rx, ry);
        else many_by_factor<1>(factor, g, size, rx, ry);
        k += size;
    }
}

}  // namespace diffopt
