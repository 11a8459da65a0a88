// What a solve leaves for its pullback: the factor of the final active set, one record for each instance.
#pragma once
#include "batch.hpp"
#include "dense.hpp"

namespace diffopt {

// Q, A and G are the same for all instances: then so is the factor of Q, and it is kept once.
inline bool matrices_shared(const Batch& batch) {
    return batch.count > 1 && batch.shared(FIELD_Q) && batch.shared(FIELD_A) && batch.shared(FIELD_G);
}

// In the place of the count: an instance that was not looked at; one without a solution; and one solved by the general
// method, of which only the active set is kept (`Sides`).
constexpr double NO_RECORD = -1, NO_SOLUTION = -2, ONLY_SIDES = -3;

// A record: count of held rows, cost; scaling d, eq, rows; the held rows' places in [A; G; I] (a lower bound's as
// -1 - place); then U (n x ldu, packed) unless shared, V (n x ld), M (count x ld, packed), rows padded to whole packs.
struct Saved {
    double *head, *d, *eq, *rows, *held, *V;
    PackedRows U, M;
    Index n, p, m, ld = 0, count = 0;
    bool shared;

    Saved(const Batch& batch, const Answer& answer, Index instance)
        : n(batch.n), p(batch.p), m(batch.m), shared(matrices_shared(batch)) {
        head = answer.saved + instance * answer.saved_stride;
        d = head + 2;
        eq = d + n;
        rows = eq + p;
        held = rows + m;
        double* rest = head + round(2 + 2 * n + p + m);
        U = {shared ? answer.saved_shared : rest, padded<Single>(n)};
        V = shared ? rest : rest + factor_size(batch);
        M = {nullptr, 0};
    }
    static Index round(Index count) { return (count + 7) / 8 * 8; }
    static Index factor_size(const Batch& b) { return round(PackedRows::size(b.n, padded<Single>(b.n))); }
    static Index size(const Batch& batch) {
        const Index factor = factor_size(batch);
        return round(2 + 2 * batch.n + batch.p + batch.m) + (matrices_shared(batch) ? factor : 2 * factor) +
               batch.n * padded<Single>(batch.n);
    }
    static Index shared_size(const Batch& batch) { return matrices_shared(batch) ? factor_size(batch) : 0; }
    void start(Index rows_held, double cost) {
        head[0] = static_cast<double>(rows_held);
        head[1] = cost;
        open();
    }
    void open() {
        count = static_cast<Index>(head[0]);
        ld = padded<Single>(count);
        M = {V + n * ld, ld};
    }
    double cost() const { return head[1]; }
    const double* end() const { return M.base + PackedRows::size(count, ld); }
    // (All of it at once: the solves ask for one row after the other.)
    void fetch() const { fetch_soon(head, end() - head); }
};

// Writes the first `size` rows of an upper factor.
inline void keep_factor(const double* U, Index ld, Index size, const PackedRows& target) {
    for (Index r = 0; r < size; r++) {
        const Index from = PackedRows::first(r);
        std::copy_n(U + r * ld + from, target.ld - from, target(r) + from);
    }
}

// Where the record of an instance lies. Small problems are kept as they were solved, W of them side by side, so that the
// pullback runs in lanes too; those that were solved alone, and large ones, have theirs in one piece.
struct Places {
    bool small;
    Index begin, alone;  // small: instances [begin, alone) lie in groups of W
    bool grouped(Index i) const { return small && i < alone; }
    Index first(Index i) const { return grouped(i) ? begin + (i - begin) / W * W : i; }
    Index step(Index i) const { return grouped(i) ? W : 1; }
    double* at(const Answer& answer, Index i) const {
        return answer.saved + first(i) * answer.saved_stride + (i - first(i));
    }
};

// The record of P::S small problems, in their lanes: kind (1 where it holds), cost; scaling d, eq, rows; for each joint
// direction whether it is held (-1: at a lower bound); 1/diagonal of U and of M; M; and, unless shared, U and V.
template <class P> struct Small {
    double *kind, *cost, *d, *eq, *rows, *held, *inv, *inv_m, *M, *U, *V;
    Index n, p, m, joint;

    Small(const Batch& batch, const Answer& answer, Index first)
        : n(batch.n), p(batch.p), m(batch.m), joint(batch.p + batch.m + batch.bounds()) {
        double* next = answer.saved + first * answer.saved_stride;
        auto take = [&](Index count) {
            double* here = next;
            next += count * P::S;
            return here;
        };
        kind = take(1), cost = take(1), d = take(n), eq = take(p), rows = take(m), held = take(joint);
        inv = take(n), inv_m = take(joint), M = take(joint * joint);
        if (matrices_shared(batch)) {
            // W - 1 records of room for a last group that is not full; then what is shared, in lanes and alone.
            next = answer.saved_shared + (W - 1) * answer.saved_stride;
            if (P::S == 1) next += W * both(batch);
        }
        U = take(n * n), V = take(n * joint);
    }
    static Index both(const Batch& b) { return b.n * b.n + b.n * (b.p + b.m + b.bounds()); }
    static Index size(const Batch& b) {
        const Index n = b.n, joint = b.p + b.m + b.bounds();
        return 2 + 2 * n + b.p + b.m + 2 * joint + joint * joint + (matrices_shared(b) ? 0 : both(b));
    }
    static Index shared_size(const Batch& b) { return matrices_shared(b) ? (W + 1) * both(b) : 0; }
};

constexpr double IN_LANES = 1;  // the kind of a record that holds

// Where a variable stands.
constexpr double FREE = 0, AT_LOWER = 1, AT_UPPER = 2, FIXED_DOWN = 3, FIXED_UP = 4;

// The record of an instance that was solved by the general method: ONLY_SIDES, cost, whether its Hessian was eliminated
// first; scaling d, eq, rows; for each row of G whether it is active; for each variable where it stands.
struct Sides {
    // Numbers of which only every step-th is ours.
    struct Spaced {
        double* base;
        Index step;
        double& operator[](Index i) const { return base[i * step]; }
    };
    Spaced head, d, eq, rows, row, bound;

    Sides(const Batch& batch, double* base, Index step) {
        auto at = [&](Index i) { return Spaced{base + i * step, step}; };
        const Index n = batch.n, p = batch.p, m = batch.m;
        head = at(0), d = at(3), eq = at(3 + n), rows = at(3 + n + p), row = at(3 + n + p + m);
        bound = at(3 + n + p + 2 * m);
    }
    static Index size(const Batch& batch) { return 3 + 2 * batch.n + batch.p + 2 * batch.m; }
    void start(double cost, bool diagonal) const { head[0] = ONLY_SIDES, head[1] = cost, head[2] = diagonal; }
    double cost() const { return head[1]; }
    bool diagonal() const { return head[2] != 0; }
};

}  // namespace diffopt
