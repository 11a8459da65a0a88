// The derivative of a solution on many vectors at once: Jacobians, transposed (as pullback.hpp, without the gradients of
// matrices) or forward. A factor is read once, and its solves are products of matrices.
//
// Forward, the vectors that come in are tangents of the conditions of optimality, K y = right: those of the gradient in
// place of x, of the sides b and h in place of nu and lam, of the bounds in place of their multipliers. What goes out are
// tangents of x, nu, lam and the bounds' multipliers, in place of dq, db, dh, dlower and dupper.
#pragma once
#include "pullback.hpp"

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

// The factor of an active set, in one piece: as `Saved` keeps it, or gathered from a lane of `Small`.
class HeldFactor {
  public:
    Index n, p, m, count, ldv;
    double cost;
    std::vector<double> d, eq, rows;
    std::vector<Index> place;    // of each held row in [A; G; I]
    std::vector<double> stands;  // of a held bound: AT_LOWER or AT_UPPER
    PackedRows U, M;
    const double* V;
    std::vector<double> inv_u, inv_m;

    HeldFactor(const Batch& batch, const Answer& answer, const Places& places, Index i) : n(batch.n), p(batch.p), m(batch.m) {
        if (!places.small) take(Saved(batch, answer, i));
        else if (places.grouped(i)) gather(Small<Lanes>(batch, answer, places.first(i)), i - places.first(i), W);
        else gather(Small<Alone>(batch, answer, i), 0, 1);
        for (Index j = 0; j < n; j++) inv_u.push_back(1 / U(j)[j]);
        for (Index j = 0; j < count; j++) inv_m.push_back(1 / M(j)[j]);
    }

  private:
    std::vector<double> own_;

    void hold(Index at, bool lower) {
        place.push_back(at);
        stands.push_back(lower ? AT_LOWER : AT_UPPER);
    }
    void take(Saved saved) {
        saved.open();
        count = saved.count, cost = saved.cost(), ldv = saved.ld;
        d.assign(saved.d, saved.d + n), eq.assign(saved.eq, saved.eq + p), rows.assign(saved.rows, saved.rows + m);
        for (Index j = 0; j < count; j++) {
            const double held = saved.held[j];
            hold(static_cast<Index>(held < 0 ? -1 - held : held), held < 0);
        }
        U = saved.U, M = saved.M, V = saved.V;
    }
    // From numbers S apart. (Rows that are not held stand apart from the others in M.)
    template <class Record> void gather(const Record& record, Index lane, Index S) {
        auto vector = [&](std::vector<double>& to, const double* from, Index size) {
            for (Index j = 0; j < size; j++) to.push_back(from[j * S + lane]);
        };
        vector(d, record.d, n), vector(eq, record.eq, p), vector(rows, record.rows, m);
        cost = record.cost[lane];
        for (Index r = 0; r < record.joint; r++)
            if (const double held = record.held[r * S + lane]; held != 0) hold(r, held < 0);
        count = static_cast<Index>(place.size());
        const Index ldu = padded<Single>(n), size_u = PackedRows::size(n, ldu);
        ldv = padded<Single>(count);
        own_.assign(static_cast<std::size_t>(size_u + n * ldv + PackedRows::size(count, ldv)), 0.0);
        U = {own_.data(), ldu}, M = {own_.data() + size_u + n * ldv, ldv};
        double* v = own_.data() + size_u;
        V = v;
        for (Index r = 0; r < n; r++) {
            for (Index c = r; c < n; c++) U(r)[c] = record.U[(r * n + c) * S + lane];
            for (Index c = 0; c < count; c++) v[r * ldv + c] = record.V[(r * record.joint + place[static_cast<std::size_t>(c)]) * S + lane];
        }
        for (Index r = 0; r < count; r++)
            for (Index c = r; c < count; c++) {
                const Index from = place[static_cast<std::size_t>(r)] * record.joint + place[static_cast<std::size_t>(c)];
                M(r)[c] = record.M[from * S + lane];
            }
    }
};

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
            const double own = v.gx ? static_cast<double>(v.gx[j]) : 0.0;
            rx[j * ld + k] = (rx[j * ld + k] + own) * (f.cost * f.d[static_cast<std::size_t>(j)]);
        }
        for (Index j = 0; j < f.count; j++) {
            const Index at = f.place[static_cast<std::size_t>(j)];
            double right = 0;
            if (at < p) right = v.gnu ? f.eq[static_cast<std::size_t>(at)] * static_cast<double>(v.gnu[at]) : 0.0;
            else if (at < p + m) right = v.glam ? f.rows[static_cast<std::size_t>(at - p)] * static_cast<double>(v.glam[at - p]) : 0.0;
            else right = v.bound_in(at - p - m, f.stands[static_cast<std::size_t>(j)]) / f.d[static_cast<std::size_t>(at - p - m)];
            ry[j * ld + k] = -right;
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
        for (Index j = 0; j < f.count; j++) {
            const Index at = f.place[static_cast<std::size_t>(j)];
            const double y = ry[j * ld + k] * per_cost;
            if (at < p) v.db[at] = static_cast<T>(y * f.eq[static_cast<std::size_t>(at)]);
            else if (at < p + m) v.dh[at - p] = static_cast<T>(y * f.rows[static_cast<std::size_t>(at - p)]);
            else v.bound_out(at - p - m, f.stands[static_cast<std::size_t>(j)], y / f.d[static_cast<std::size_t>(at - p - m)]);
        }
    }
}

// Vectors [from, to) of instance i.
template <class T>
void pull_many(const Batch& batch, const Answer& answer, const Places& places, const Gradients& gradients, const Many& many,
               Index i, Index from, Index to, PullbackWork& work) {
    const double kind = *places.at(answer, i);
    std::vector<Pull<T>> asked;
    for (Index k = from; k < to; k++) {
        Pull<T> g(batch, answer, gradients, i, many.at(k, i));
        g.forward = many.forward != 0;
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
            pull_by_sides(g, sides, again);
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
