// The inverse of K, for vectors of which each has one entry: what comes of it is a column.
//
// In equilibrated units, with U'U = Q, V = U^-T C' for the held rows C, M'M = V'V, and L = U^-T, S = M^-T V'L, N = M^-T:
//   of x by x: L'L - S'S,   of x by held rows: S'N,   of held rows by held rows: -N'N.
// Triangles and symmetry make that half the work of as many solves as there are unknowns, and it is all products.
#pragma once
#include "held.hpp"

namespace diffopt {

// The only entry of a vector.
struct Entry {
    enum Kind { NONE, OF_X, OF_ROW, SEVERAL } kind;
    Index at;  // in x, or in [A; G; I]
};

template <class T> Entry only_entry(const Pull<T>& g) {
    Entry found{Entry::NONE, 0};
    auto look = [&](const T* v, Index size, Entry::Kind kind, Index offset) {
        if (!v || found.kind == Entry::SEVERAL) return;
        Index entries = 0;
        for (Index j = 0; j < size; j++) entries += v[j] != 0;  // NaN too
        if (entries == 0) return;
        if (entries > 1 || found.kind != Entry::NONE) {
            found.kind = Entry::SEVERAL;
            return;
        }
        found = {kind, offset};
        while (v[found.at - offset] == 0) found.at++;
    };
    look(g.gx, g.n, Entry::OF_X, 0);
    look(g.gs, g.m, Entry::SEVERAL, 0);  // (a slack is no unknown of K)
    look(g.gnu, g.p, Entry::OF_ROW, 0);
    look(g.glam, g.m, Entry::OF_ROW, g.p);
    look(g.glower, g.n, Entry::OF_ROW, g.p + g.m);
    look(g.gupper, g.n, Entry::OF_ROW, g.p + g.m);
    return found;
}

// Whether inverting takes fewer operations than solving for so many vectors.
inline bool worth_inverting(const HeldFactor& f, Index vectors) {
    const double n = static_cast<double>(f.n), k = static_cast<double>(f.count);
    return n * n * n / 3 + n * n * k + n * k * k + k * k * k / 3 <= static_cast<double>(vectors) * (n * n + 2 * n * k + k * k);
}

class Inverse {
  public:
    // `space` is scratch, and holds the inverse afterwards.
    Inverse(const HeldFactor& factor, const std::vector<Entry>& entries, std::vector<double>& space)
        : f(factor), n(f.n), count(f.count), ldn(padded<Single>(n)), ldk(padded<Single>(count)) {
        const Index size = 3 * n * ldn + count * ldn + 2 * count * ldk + n * ldk + count * ldk;
        if (space.size() < index(size)) space.resize(index(size));
        double* next = space.data();
        auto take = [&](Index rows, Index ld) {
            double* here = next;
            next += rows * ld;
            return here;
        };
        double *U = take(n, ldn), *L = take(n, ldn), *S = take(count, ldn), *M = take(count, ldk), *N = take(count, ldk);
        XX = take(n, ldn), XY = take(n, ldk), YY = take(count, ldk);
        const Index packs = ldn / W, packs_k = ldk / W;
        auto diagonal = [](Index q) { return q * W; };
        auto top = [](Index) { return Index{0}; };
        invert_transposed(f.U, f.inv_u, U, L, n, ldn);
        row_blocks(count, [&](auto rows, Index i) {
            constexpr int R = decltype(rows)::value;
            row_tiles<R>(i, 0, packs, [&](auto, auto width, Index, Index q) {
                Vec acc[R][decltype(width)::value] = {};
                tile<Single, false>(acc, f.V, f.ldv, i, L, ldn, q, diagonal(q), n);
                keep(acc, S, ldn, i, q);
            });
        });
        invert_transposed(f.M, f.inv_m, M, N, count, ldk);
        solve_transposed<Single>(M, ldk, f.inv_m.data(), count, S, ldn, 0, packs, top);
        gram<Single, false>(L, ldn, n, n, nullptr, 0, XX, ldn, diagonal);
        gram<Single, true>(S, ldn, count, n, XX, ldn, XX, ldn, top);
        mirror(XX, n, ldn);
        row_blocks(n, [&](auto rows, Index i) {
            constexpr int R = decltype(rows)::value;
            row_tiles<R>(i, 0, packs_k, [&](auto, auto width, Index, Index q) {
                Vec acc[R][decltype(width)::value] = {};
                tile<Single, false>(acc, S, ldn, i, N, ldk, q, diagonal(q), count);
                keep(acc, XY, ldk, i, q);
            });
        });
        slot.assign(index(n + f.p + f.m), -1);
        for (Index j = 0; j < count; j++) slot[index(f.place[index(j)])] = j;
        if (std::any_of(entries.begin(), entries.end(), [](const Entry& e) { return e.kind == Entry::OF_ROW; })) {
            gram<Single, false>(N, ldk, count, count, nullptr, 0, YY, ldk, diagonal);
            mirror(YY, count, ldk);
        }
    }

    // What comes of a vector with this entry.
    template <class T> void write(const Pull<T>& v, const Entry& entry) const {
        v.clear_vectors();
        if (entry.kind == Entry::OF_X) {
            const double in = v.x_in(entry.at) * f.d[index(entry.at)];
            const double *x = XX + entry.at * ldn, *y = XY + entry.at * ldk, by_x = (v.forward ? in : -in) * f.cost;
            for (Index j = 0; j < n; j++) v.dq[j] = static_cast<T>(by_x * f.d[index(j)] * x[j]);
            for (Index j = 0; j < count; j++) f.pass(v, j, in * y[j]);
            return;
        }
        const Index row = entry.kind == Entry::NONE ? -1 : slot[index(entry.at)];
        if (row < 0) {  // a row that is not held
            std::fill_n(v.dq, n, T(0));
            return;
        }
        const double in = f.right(v, row), by_x = v.forward ? in : -in, by_y = -in / f.cost;
        for (Index j = 0; j < n; j++) v.dq[j] = static_cast<T>(by_x * f.d[index(j)] * XY[j * ldk + row]);
        for (Index j = 0; j < count; j++) f.pass(v, j, by_y * YY[row * ldk + j]);
    }

  private:
    const HeldFactor& f;
    Index n, count, ldn, ldk;
    double *XX, *XY, *YY;
    std::vector<Index> slot;  // of each row of [A; G; I] among the held ones, or -1

    static std::size_t index(Index i) { return static_cast<std::size_t>(i); }

    // target = U^-T, lower; `whole` becomes U with rows of equal length, without what is left of its diagonal.
    static void invert_transposed(const PackedRows& U, const std::vector<double>& inv, double* whole, double* target, Index size, Index ld) {
        for (Index r = 0; r < size; r++) {
            const Index from = PackedRows::first(r);
            std::copy_n(U(r) + from, ld - from, whole + r * ld + from);
        }
        std::fill_n(target, size * ld, 0.0);
        for (Index r = 0; r < size; r++) target[r * ld + r] = 1;
        solve_transposed<Single>(whole, ld, inv.data(), size, target, ld, 0, ld / W, [](Index q) { return q * W; });
    }
    template <int R, int C> static INLINE void keep(const Vec (&acc)[R][C], double* target, Index ld, Index i, Index q) {
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) Single::store(target + (i + r) * ld + (q + c) * W, acc[r][c]);
    }
    // The lower triangle, from the upper.
    static void mirror(double* D, Index size, Index ld) {
        constexpr Index B = 8;
        for (Index i = 0; i < size; i += B)
            for (Index k = 0; k <= i; k += B)
                for (Index r = i; r < std::min(i + B, size); r++)
                    for (Index c = k; c < std::min(k + B, r); c++) D[r * ld + c] = D[c * ld + r];
    }
};

}  // namespace diffopt
