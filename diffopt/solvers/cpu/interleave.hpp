// Between problems that lie in one piece each, as users have them, and the lanes of registers.
#pragma once
#include <utility>

#include "batch.hpp"

namespace diffopt {

// Swaps the blocks of H entries that lie across the diagonal, in each square of 2 H.
template <int H, int... J> INLINE void swap_blocks(Vec (&v)[W], std::integer_sequence<int, J...>) {
    for (int i = 0; i < W; i++) {
        if (i & H) continue;
        const Vec a = v[i], b = v[i + H];
        v[i] = shuffle<(J & H ? W + J - H : J)...>(a, b);
        v[i + H] = shuffle<(J & H ? W + J : J + H)...>(a, b);
    }
}

// Entry j of register i becomes entry i of register j.
INLINE void transpose(Vec (&v)[W]) {
    constexpr std::make_integer_sequence<int, W> all;
    if constexpr (W > 4) swap_blocks<4>(v, all);
    if constexpr (W > 2) swap_blocks<2>(v, all);
    swap_blocks<1>(v, all);
}

// W numbers as the user has them, from and to double.
INLINE Vec load_as_double(const double* p) { return Wide::load(p); }
INLINE void store_as(double* p, Vec v) { Wide::store(p, v); }
typedef float Floats __attribute__((vector_size(4 * DIFFOPT_WIDTH)));
INLINE Vec load_as_double(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Vec);
}
INLINE void store_as(float* p, Vec v) {
    const Floats rounded = __builtin_convertvector(v, Floats);
    std::memcpy(p, &rounded, sizeof rounded);
}

// Calls f(r, c) for the squares of W x W that cover a matrix.
template <class F> INLINE void squares(Index rows, Index columns, const F& f) {
    for (Index r = 0; r < rows; r += W)
        for (Index c = 0; c < columns; c += W) f(r, c);
}

// The square at (r, c) of a matrix as the user has it, with zeros beyond its edges.
template <class T> INLINE void load_square(const T* from, Index rows, Index columns, Index r, Index c, Vec (&v)[W]) {
    const Index high = std::min<Index>(W, rows - r), wide = std::min<Index>(W, columns - c);
    from += r * columns + c;
    // (What stands behind the end of a row is the next one, as long as there are more.)
    const Mask inside = Single::inside(0, wide);
    const Index room = (rows - r) * columns - c - W;
    for (int i = 0; i < W; i++) {
        if (i >= high) {
            v[i] = Vec{};
        } else if (i * columns > room) {
            T row[W] = {};
            std::copy_n(from + i * columns, wide, row);
            v[i] = load_as_double(row);
        } else {
            v[i] = wide == W ? load_as_double(from + i * columns) : select(inside, load_as_double(from + i * columns), 0.0);
        }
    }
}

// Writes those rows of the square at (r, c) that a matrix of ours has; its rows are padded to whole registers.
INLINE void store_square(double* to, Index ld, Index rows, Index r, Index c, const Vec (&v)[W]) {
    for (Index i = 0; i < W && r + i < rows; i++) Wide::store(to + (r + i) * ld + c, v[i]);
}

// One pointer for each problem of a group.
template <class P, class T> struct Each {
    T* problem[P::S];
    T* operator[](int lane) const { return problem[lane]; }
};

// The data of the problems from `first` on; a group that is not full is filled up with its last problem.
template <class P, class T> INLINE Each<P, const T> each(const Batch& batch, Field field, Index first) {
    Each<P, const T> found;
    for (int lane = 0; lane < P::S; lane++)
        found.problem[lane] = batch.at<T>(field, first + lane < batch.count ? first + lane : batch.count - 1);
    return found;
}

// Calls put(e, entry e of all problems) for e < size; some entries may come twice.
template <class P, class T, class Put> INLINE void to_lanes(const Each<P, const T>& from, Index size, const Put& put) {
    if constexpr (P::S == 1) {
        for (Index e = 0; e < size; e++) put(e, static_cast<double>(from[0][e]));
    } else if (size >= W) {
        for (Index next = 0; next < size; next += W) {
            const Index e = next + W <= size ? next : size - W;
            Vec v[W];
            for (int lane = 0; lane < W; lane++) v[lane] = load_as_double(from[lane] + e);
            transpose(v);
            for (int j = 0; j < W; j++) put(e + j, v[j]);
        }
    } else {
        for (Index e = 0; e < size; e++) {
            Vec v;
            for (int lane = 0; lane < W; lane++) v[lane] = static_cast<double>(from[lane][e]);
            put(e, v);
        }
    }
}

// Writes get(e) for e < size to all problems whose pointer is not null.
template <class P, class T, class Get> INLINE void from_lanes(const Each<P, T>& to, Index size, const Get& get) {
    if constexpr (P::S == 1) {
        for (Index e = 0; to[0] && e < size; e++) to[0][e] = static_cast<T>(get(e));
    } else if (size >= W) {
        for (Index next = 0; next < size; next += W) {
            const Index e = next + W <= size ? next : size - W;
            Vec v[W];
            for (int j = 0; j < W; j++) v[j] = get(e + j);
            transpose(v);
            for (int lane = 0; lane < W; lane++)
                if (to[lane]) store_as(to[lane] + e, v[lane]);
        }
    } else {
        for (Index e = 0; e < size; e++) {
            const Vec v = get(e);
            for (int lane = 0; lane < W; lane++)
                if (to[lane]) to[lane][e] = static_cast<T>(v[lane]);
        }
    }
}

}  // namespace diffopt
