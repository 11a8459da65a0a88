// Registers of W numbers, and the two ways in which problems lie in them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// A register of exactly the machine's width: wider vector types are split badly by compilers.
#if defined(__AVX512F__)
#define DIFFOPT_WIDTH 8
#elif defined(__AVX__)
#define DIFFOPT_WIDTH 4
#else
#define DIFFOPT_WIDTH 2
#endif

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace diffopt {

constexpr int W = DIFFOPT_WIDTH;
typedef double Vec __attribute__((vector_size(8 * DIFFOPT_WIDTH)));
typedef int64_t Mask __attribute__((vector_size(8 * DIFFOPT_WIDTH)));  // all bits set is true

using Index = std::ptrdiff_t;
constexpr double INF = __builtin_inf();

// a * b + c, rounded once where the machine can. Written out, and never left to the compiler (-ffp-contract=off): the
// same problem must give the same bits in a register's lane and on its own.
#if defined(__AVX512F__)
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
INLINE Vec fnma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__FMA__)
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
INLINE Vec fnma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
INLINE Vec fnma(Vec a, Vec b, Vec c) { return (Vec)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
#endif
#if defined(__FMA__) || (defined(__ARM_NEON) && defined(__aarch64__))
INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
INLINE double fnma(double a, double b, double c) { return __builtin_fma(-a, b, c); }
#else
INLINE double fma(double a, double b, double c) { return a * b + c; }
INLINE double fnma(double a, double b, double c) { return c - a * b; }
#endif

INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a : b; }
INLINE double select(bool m, double a, double b) { return m ? a : b; }
INLINE Vec select(Mask m, Vec a, double b) { return m ? a : b - Vec{}; }
INLINE Vec select(Mask m, double a, Vec b) { return m ? a - Vec{} : b; }
INLINE Vec select(Mask m, double a, double b) { return m ? a - Vec{} : b - Vec{}; }
// Where a is NaN both return b. (One instruction, which compilers do not find behind the comparison.)
#if defined(__AVX512F__)
INLINE Vec vmax(Vec a, Vec b) { return (Vec)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b); }
INLINE Vec vmin(Vec a, Vec b) { return (Vec)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b); }
#elif defined(__AVX__)
INLINE Vec vmax(Vec a, Vec b) { return (Vec)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE Vec vmin(Vec a, Vec b) { return (Vec)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
#endif
INLINE double vmax(double a, double b) { return a > b ? a : b; }
INLINE double vmin(double a, double b) { return a < b ? a : b; }
// Unlike vmax, a NaN in either operand stays: errors must not vanish in a maximum.
INLINE Vec vmax_nan(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }
INLINE double vmax_nan(double a, double b) { return a > b || a != a ? a : b; }
INLINE Vec vabs(Vec a) { return (Vec)((Mask)a & 0x7fffffffffffffffLL); }
INLINE double vabs(double a) { return std::fabs(a); }
INLINE double vsqrt(double a) { return std::sqrt(a); }
#if defined(__AVX512F__)
INLINE Vec vsqrt(Vec a) { return (Vec)_mm512_maskz_sqrt_pd(0xff, (__m512d)a); }
#elif defined(__AVX__)
INLINE Vec vsqrt(Vec a) { return (Vec)_mm256_sqrt_pd((__m256d)a); }
#else
INLINE Vec vsqrt(Vec a) {
    for (int i = 0; i < W; i++) a[i] = std::sqrt(a[i]);
    return a;
}
#endif
// Entries I of a and b, which count on from a's.
#if defined(__clang__)
template <int... I> INLINE Vec shuffle(Vec a, Vec b) { return __builtin_shufflevector(a, b, I...); }
#else
template <int... I> INLINE Vec shuffle(Vec a, Vec b) { return __builtin_shuffle(a, b, Mask{I...}); }
#endif
// All entries of a register by halves: op(op(0, 4), op(2, 6)), op(...) and so on.
template <class Op> INLINE double reduce(Vec v, Op op) {
#if DIFFOPT_WIDTH == 8
    v = op(v, shuffle<4, 5, 6, 7, 0, 1, 2, 3>(v, v));
    v = op(v, shuffle<2, 3, 0, 1, 6, 7, 4, 5>(v, v));
    v = op(v, shuffle<1, 0, 3, 2, 5, 4, 7, 6>(v, v));
#elif DIFFOPT_WIDTH == 4
    v = op(v, shuffle<2, 3, 0, 1>(v, v));
    v = op(v, shuffle<1, 0, 3, 2>(v, v));
#else
    v = op(v, shuffle<1, 0>(v, v));
#endif
    return v[0];
}
INLINE bool any(Mask m) {
    int64_t r = 0;
    for (int i = 0; i < W; i++) r |= m[i];
    return r != 0;
}
INLINE bool any(bool m) { return m; }
INLINE Mask none_of(Mask m) { return ~m; }
INLINE bool none_of(bool m) { return !m; }

// Writes to memory around the caches: what is written once, and is larger than they are, need not be read first.
#if defined(__AVX512F__)
INLINE void stream(double* p, Vec v) { _mm512_stream_pd(p, (__m512d)v); }
INLINE void stream_end() { _mm_sfence(); }
#elif defined(__AVX__)
INLINE void stream(double* p, Vec v) { _mm256_stream_pd(p, (__m256d)v); }
INLINE void stream_end() { _mm_sfence(); }
#else
INLINE void stream(double* p, Vec v) { std::memcpy(p, &v, sizeof v); }
INLINE void stream_end() {}
#endif

// 2 to the power nearest to log2(x), for x > 0: a significand of sqrt(2) or more counts up.
INLINE Vec power_of_two(Vec x) {
    constexpr int64_t exponent = 0x7ff0000000000000LL, to_next = 0x10000000000000LL - 0x6a09e667f3bcdLL;
    Mask bits = ((Mask)x + to_next) & exponent;
    return select((x > 0.0) & (x < INF), (Vec)bits, 1.0);
}
INLINE double power_of_two(double x) {
    constexpr int64_t exponent = 0x7ff0000000000000LL, to_next = 0x10000000000000LL - 0x6a09e667f3bcdLL;
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + to_next) & exponent;
    double y;
    std::memcpy(&y, &bits, sizeof y);
    return x > 0 && x < INF ? y : 1.0;
}
INLINE double power_of_four(double x) {
    return x > 0 && x < INF ? std::exp2(2 * std::nearbyint(std::log2(x) / 2)) : 1.0;
}
INLINE Vec power_of_four(Vec x) {
    for (int i = 0; i < W; i++) x[i] = power_of_four(x[i]);
    return x;
}

// 1 / sqrt(x) to five digits for normal x > 0: a root and a division take several times as long. Two Newton steps from
// half the exponent, negated; Blinn (1997), "Floating-point tricks".
template <class Bits, class Number> INLINE Number rough_inverse_root(Number x) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof x);
    bits = 0x5fe6eb50c7b537a9LL - (bits >> 1);
    Number y;
    std::memcpy(&y, &bits, sizeof y);
    for (int step = 0; step < 2; step++) y = y * (1.5 - 0.5 * (x * y) * y);
    return y;
}
INLINE Vec rough_inverse_root(Vec x) { return rough_inverse_root<Mask>(x); }
INLINE double rough_inverse_root(double x) { return rough_inverse_root<int64_t>(x); }

// How problems lie in registers. Everything is written once for all three:
//
//   Single: one problem, whose neighbouring entries share a register;
//   Lanes:  W problems, one in each lane, for those too small to fill a register alone;
//   Alone:  one problem by the instructions of a lane, where there are too few to fill the lanes. Same bits as there.
//
// A "pack" is one register full of a vector; pack q of a vector lies at + q * P::W. E entries of a problem make a pack,
// and its entries are S numbers apart. `Number` is one quantity of each problem (a step length, say), `Flag` a truth.
struct Wide {
    static constexpr int W = DIFFOPT_WIDTH;
    using Vec = diffopt::Vec;
    using Mask = diffopt::Mask;
    static INLINE Vec load(const double* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
    static INLINE void store(double* p, Vec v) { std::memcpy(p, &v, sizeof v); }
    static INLINE Mask load_mask(const double* p) { Mask v; std::memcpy(&v, p, sizeof v); return v; }
    static INLINE void store_mask(double* p, Mask v) { std::memcpy(p, &v, sizeof v); }
    // (x - 0 is x for every x, so no subtraction is left of this; 0 + x is not for x = -0.)
    static INLINE Vec splat(double x) { return x - Vec{}; }
    static INLINE Vec splat(Vec x) { return x; }
};

struct Single : Wide {
    static constexpr bool LANES = false;
    static constexpr int E = W, S = 1;
    using Number = double;
    using Flag = bool;
    static INLINE double get(const double* p, Index i) { return p[i]; }
    static INLINE void put(double* p, Index i, double x) { p[i] = x; }
    static INLINE double sum(Vec v) {
        return reduce(v, [](Vec a, Vec b) { return a + b; });
    }
    static INLINE double max(Vec v) {
        return reduce(v, [](Vec a, Vec b) { return vmax_nan(a, b); });
    }
    static INLINE double min(Vec v) {
        return reduce(v, [](Vec a, Vec b) { return vmin(a, b); });
    }
    static INLINE Mask spread(bool b) { return Mask{} - (int64_t)b; }
    static INLINE bool any_entry(Mask m) { return any(m); }
    static INLINE bool lane(bool b, int) { return b; }
    static INLINE double lane(double x, int) { return x; }
    static INLINE void set_lane(double& x, int, double v) { x = v; }
    static INLINE int count(Mask m, int) {
        int r = 0;
        for (int i = 0; i < W; i++) r += m[i] != 0;
        return r;
    }
    // Entries of the pack that starts at `entry` which are below `size`: the others are padding.
    static INLINE Mask inside(Index entry, Index size) {
        Mask m{};
        for (int i = 0; i < W; i++) m[i] = entry + i < size ? -1 : 0;
        return m;
    }
};

struct Lanes : Wide {
    static constexpr bool LANES = true;
    static constexpr int E = 1, S = W;
    using Number = Vec;
    using Flag = Mask;
    static INLINE Vec get(const double* p, Index i) { return load(p + i * W); }
    static INLINE void put(double* p, Index i, Vec x) { store(p + i * W, x); }
    static INLINE Vec sum(Vec v) { return v; }
    static INLINE Vec max(Vec v) { return v; }
    static INLINE Vec min(Vec v) { return v; }
    static INLINE Mask spread(Mask b) { return b; }
    static INLINE Mask any_entry(Mask m) { return m; }
    static INLINE bool lane(Mask b, int l) { return b[l] != 0; }
    static INLINE double lane(Vec x, int l) { return x[l]; }
    static INLINE void set_lane(Vec& x, int l, double v) { x[l] = v; }
    static INLINE int count(Mask m, int l) { return m[l] != 0; }
    static INLINE Mask inside(Index entry, Index size) { return Mask{} - static_cast<int64_t>(entry < size); }
};

struct Alone {
    static constexpr bool LANES = true;
    static constexpr int W = 1, E = 1, S = 1;
    using Vec = double;
    using Mask = bool;
    using Number = double;
    using Flag = bool;
    static INLINE double load(const double* p) { return *p; }
    static INLINE void store(double* p, double v) { *p = v; }
    static INLINE bool load_mask(const double* p) { int64_t v; std::memcpy(&v, p, sizeof v); return v != 0; }
    static INLINE void store_mask(double* p, bool m) { const int64_t v = -(int64_t)m; std::memcpy(p, &v, sizeof v); }
    static INLINE double splat(double x) { return x; }
    static INLINE double get(const double* p, Index i) { return p[i]; }
    static INLINE void put(double* p, Index i, double x) { p[i] = x; }
    static INLINE double sum(double v) { return v; }
    static INLINE double max(double v) { return v; }
    static INLINE double min(double v) { return v; }
    static INLINE bool spread(bool b) { return b; }
    static INLINE bool any_entry(bool m) { return m; }
    static INLINE bool lane(bool b, int) { return b; }
    static INLINE double lane(double x, int) { return x; }
    static INLINE void set_lane(double& x, int, double v) { x = v; }
    static INLINE int count(bool m, int) { return m; }
    static INLINE bool inside(Index entry, Index size) { return entry < size; }
};

template <class P> INLINE Index padded(Index n) { return (n + P::E - 1) / P::E * P::E; }

}  // namespace diffopt
