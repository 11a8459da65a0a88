// The factor of an active set as a solve has kept it, wherever that is.
#pragma once
#include "pullback.hpp"

namespace diffopt {

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

    // What a vector brings to the right-hand side of held row j, and what its multiplier there is passed on as (in units
    // of the objective).
    template <class T> double right(const Pull<T>& v, Index j) const {
        const Index at = place[index(j)];
        if (at < p) return v.gnu ? eq[index(at)] * static_cast<double>(v.gnu[at]) : 0.0;
        if (at < p + m) return v.glam ? rows[index(at - p)] * static_cast<double>(v.glam[at - p]) : 0.0;
        return v.bound_in(at - p - m, stands[index(j)]) / d[index(at - p - m)];
    }
    template <class T> void pass(const Pull<T>& v, Index j, double y) const {
        const Index at = place[index(j)];
        if (at < p) v.db[at] = static_cast<T>(y * eq[index(at)]);
        else if (at < p + m) v.dh[at - p] = static_cast<T>(y * rows[index(at - p)]);
        else v.bound_out(at - p - m, stands[index(j)], y / d[index(at - p - m)]);
    }
    static std::size_t index(Index i) { return static_cast<std::size_t>(i); }

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

}  // namespace diffopt
