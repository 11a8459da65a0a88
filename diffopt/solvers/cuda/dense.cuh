// Dense linear algebra of one team on matrices of at most a few hundred rows.
#pragma once
#include "team.cuh"

namespace diffopt {

// Columns that are factored together. Their diagonal block is replaced by its inverse, so that solving with it has no
// chain of divisions: a team has few numbers to work on, and what it waits for is latency.
constexpr int PANEL = 16;

// Outputs that one thread accumulates at a time: each number it loads is then used that often.
constexpr int TILE = 8;

__device__ inline int lesser(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline constexpr int triangle(int k) { return k * (k + 1) / 2; }

// A lower triangle, column by column: threads of consecutive rows touch consecutive numbers.
struct Packed {
    double* at;
    int dim;
    __device__ double& operator()(int i, int j) const { return at[j * (2 * dim - j - 1) / 2 + i]; }
};

__device__ inline Packed in_shared(const Packed& M) { return {in_shared(M.at), M.dim}; }

// Factor rows and columns [k0, k1) of M, at most PANEL, by one warp, and replace the block by the inverse of its factor.
// Each lane keeps a row, and all of the diagonal, in registers; the columns pass through M. Ends without a barrier.
template <class Team>
__device__ inline void factor_diagonal(const Team& team, const Packed& M, int k0, int k1) {
    constexpr int OWN = WARP >= PANEL ? 1 : PANEL / WARP;
    const int lane = team.lane(), width = k1 - k0;
    double row[OWN][PANEL], pivots[PANEL];
#pragma unroll
    for (int j = 0; j < PANEL; ++j) {
        pivots[j] = j < width ? M(k0 + j, k0 + j) : 1.0;
        for (int o = 0; o < OWN; ++o) {
            const int i = lane + o * WARP;
            row[o][j] = j < i && i < width ? M(k0 + i, k0 + j) : 0.0;
        }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < PANEL; ++k) {
        if (k < width) {
            const bool good = pivots[k] > 0 && finite(pivots[k]);
            const double root = good ? 1.0 / sqrt(pivots[k]) : 1.0;
            if (lane == 0) {
                M(k0 + k, k0 + k) = root;
                if (!good) *team.flag = 1;
            }
            for (int o = 0; o < OWN; ++o) {
                const int i = lane + o * WARP;
                row[o][k] *= root;
                if (i > k && i < width) M(k0 + i, k0 + k) = row[o][k];
            }
            __syncwarp();
#pragma unroll
            for (int j = k + 1; j < PANEL; ++j) {
                const double l = j < width ? M(k0 + j, k0 + k) : 0.0;
                pivots[j] -= l * l;
                for (int o = 0; o < OWN; ++o) row[o][j] -= row[o][k] * l;
            }
        }
    }
    // Column j of the inverse X: x_j = 1/l_jj, x_i = -(sum over j <= l < i of l_il x_l) / l_ii. The rows are not needed
    // any more, and their registers hold the columns. The last column's barrier has passed.
    for (int o = 0; o < OWN; ++o) {
        const int j = lane + o * WARP;
#pragma unroll
        for (int i = 0; i < PANEL; ++i) {
            double sum = 0;
#pragma unroll
            for (int l = 0; l < i; ++l) {
                if (i < width) sum += M(k0 + i, k0 + l) * row[o][l];
            }
            const double scale = i < width ? M(k0 + i, k0 + i) : 0.0;
            row[o][i] = i == j ? scale : (i > j ? -sum * scale : 0.0);
        }
    }
    __syncwarp();
    for (int o = 0; o < OWN; ++o) {
        const int j = lane + o * WARP;
#pragma unroll
        for (int i = 0; i < PANEL; ++i) {
            if (i > j && i < width) M(k0 + i, k0 + j) = row[o][i];
        }
    }
}

// Cholesky factor of the first `count` columns of M; what lies below and to the right becomes the Schur complement.
// Diagonal blocks end as the inverses of the factor's. Returns whether all pivots were positive. M is complete on entry.
template <class Team>
DIFFOPT_STEP bool cholesky(const Team& team, const Packed& matrix, int count) {
    const Packed M = team.matrix(matrix);
    if (team.rank == 0) *team.flag = 0;
    team.sync();
    for (int k0 = 0; k0 < count; k0 += PANEL) {
        const int k1 = lesser(k0 + PANEL, count), width = k1 - k0;
        if (team.rank < WARP) factor_diagonal(team, M, k0, k1);
        team.sync();  // the panel's rows read the inverse of the diagonal block
        for (int i = k1 + team.rank; i < M.dim; i += team.size) {
            double a[PANEL];
#pragma unroll
            for (int j = 0; j < PANEL; ++j) a[j] = j < width ? M(i, k0 + j) : 0.0;
#pragma unroll
            for (int j = 0; j < PANEL; ++j) {
                if (j < width) {
                    double sum = 0;
#pragma unroll
                    for (int l = 0; l <= j; ++l) sum += M(k0 + j, k0 + l) * a[l];
                    M(i, k0 + j) = sum;
                }
            }
        }
        team.sync();  // the trailing update reads other threads' rows
        const int rest = M.dim - k1, items = rest * ((rest + TILE - 1) / TILE);
        for (int item = team.rank; item < items; item += team.size) {
            const int i = k1 + item % rest, j0 = k1 + item / rest * TILE;
            if (i < j0) continue;
            double sum[TILE] = {};
            for (int k = k0; k < k1; ++k) {
                const double left = M(i, k);
#pragma unroll
                for (int b = 0; b < TILE; ++b) sum[b] += left * M(lesser(j0 + b, i), k);
            }
#pragma unroll
            for (int b = 0; b < TILE; ++b) {
                if (j0 + b <= i) M(i, j0 + b) -= sum[b];
            }
        }
        team.sync();  // the next panel, and the caller, read the update
    }
    const bool good = *team.flag == 0;
    team.sync();  // the flag is free again
    return good;
}

// The smallest and the largest squared pivot of the first `count` columns of a factor; (1, 1) for none.
template <class Team>
DIFFOPT_STEP void pivot_range(const Team& team, const Packed& M, int count, double& least, double& most) {
    // Of 1 / pivot both extremes are maxima.
    double v[2] = {0.0, 0.0};
    for (int k = team.rank; k < count; k += team.size) {
        const double inverse = M(k, k) * M(k, k);
        v[0] = larger(v[0], inverse);
        v[1] = larger(v[1], 1 / inverse);
    }
    team.max(v);
    least = count ? 1 / v[0] : 1.0;
    most = count ? v[1] : 1.0;
}

// Solve L result = right with the first `count` columns of a factor. right is complete on entry and used up.
template <class Team>
DIFFOPT_STEP void solve_lower(const Team& team, const Packed& factor, int count, double* right, double* result) {
    const Packed M = team.matrix(factor);
    double *v = in_shared(right), *out = in_shared(result);
    for (int k0 = 0; k0 < count; k0 += PANEL) {
        const int k1 = lesser(k0 + PANEL, count);
        for (int i = k0 + team.rank; i < k1; i += team.size) {
            double sum = 0;
#pragma unroll 4
            for (int j = k0; j <= i; ++j) sum += M(i, j) * v[j];
            out[i] = sum;
        }
        team.sync();  // all rows below read this panel's results
        for (int i = k1 + team.rank; i < count; i += team.size) {
            double sum = v[i];
#pragma unroll 4
            for (int j = k0; j < k1; ++j) sum -= M(i, j) * out[j];
            v[i] = sum;
        }
        team.sync();  // the next panel reads v
    }
}

// Solve L' result = right, likewise.
template <class Team>
DIFFOPT_STEP void solve_upper(const Team& team, const Packed& factor, int count, double* right, double* result) {
    const Packed M = team.matrix(factor);
    double *v = in_shared(right), *out = in_shared(result);
    for (int k1 = count; k1 > 0;) {
        const int k0 = (k1 - 1) / PANEL * PANEL;
        for (int j = k0 + team.rank; j < k1; j += team.size) {
            double sum = 0;
#pragma unroll 4
            for (int i = j; i < k1; ++i) sum += M(i, j) * v[i];
            out[j] = sum;
        }
        team.sync();  // all rows above read this panel's results
        for (int j = team.rank; j < k0; j += team.size) {
            double sum = v[j];
#pragma unroll 4
            for (int i = k0; i < k1; ++i) sum -= M(i, j) * out[i];
            v[j] = sum;
        }
        team.sync();  // the next panel reads v
        k1 = k0;
    }
}

// matrix <- L^-1 matrix, n x columns, row by row with `ld` numbers a row, for a factor L of n columns.
template <class Team>
DIFFOPT_STEP void solve_lower_columns(const Team& team, const Packed& factor, double* matrix, int ld, int columns) {
    const Packed L = team.matrix(factor);
    double* V = team.matrix(matrix);
    const int n = L.dim;
    for (int k0 = 0; k0 < n; k0 += PANEL) {
        const int k1 = lesser(k0 + PANEL, n), width = k1 - k0;
        for (int j = team.rank; j < columns; j += team.size) {
            double v[PANEL];
#pragma unroll
            for (int i = 0; i < PANEL; ++i) v[i] = i < width ? V[(k0 + i) * ld + j] : 0.0;
#pragma unroll
            for (int i = 0; i < PANEL; ++i) {
                if (i < width) {
                    double sum = 0;
#pragma unroll
                    for (int l = 0; l <= i; ++l) sum += L(k0 + i, k0 + l) * v[l];
                    V[(k0 + i) * ld + j] = sum;
                }
            }
        }
        team.sync();  // rows below read this panel's rows
        const int items = columns * ((n - k1 + TILE - 1) / TILE);
        for (int item = team.rank; item < items; item += team.size) {
            const int j = item % columns, i0 = k1 + item / columns * TILE;
            double sum[TILE] = {};
            for (int k = k0; k < k1; ++k) {
                const double right = V[k * ld + j];
#pragma unroll
                for (int b = 0; b < TILE; ++b) sum[b] += L(lesser(i0 + b, n - 1), k) * right;
            }
#pragma unroll
            for (int b = 0; b < TILE; ++b) {
                if (i0 + b < n) V[(i0 + b) * ld + j] -= sum[b];
            }
        }
        team.sync();  // the next panel, and the caller, read the update
    }
}

// result <- V'V, the lower triangle, for V as above with result.dim columns. Ends without a barrier.
template <class Team>
DIFFOPT_STEP void gram(const Team& team, const double* matrix, int ld, int n, const Packed& result) {
    const double* V = team.matrix(matrix);
    const Packed M = team.matrix(result);
    const int items = M.dim * ((M.dim + TILE - 1) / TILE);
    for (int item = team.rank; item < items; item += team.size) {
        const int i = item % M.dim, j0 = item / M.dim * TILE;
        if (i < j0) continue;
        double sum[TILE] = {};
        for (int k = 0; k < n; ++k) {
            const double left = V[k * ld + i];
#pragma unroll
            for (int b = 0; b < TILE; ++b) sum[b] += left * V[k * ld + lesser(j0 + b, i)];
        }
#pragma unroll
        for (int b = 0; b < TILE; ++b) {
            if (j0 + b <= i) M(i, j0 + b) = sum[b];
        }
    }
}

// out <- M right for a matrix in global memory, row by row with `ld` numbers a row: a warp for each row, so that loads
// coalesce. right is complete on entry. Ends without a barrier.
template <class T, class Team>
DIFFOPT_STEP void times(const Team& team, const T* M, int rows, int columns, int ld, const double* right, double* out) {
    const double* v = in_shared(right);
    for (int i = team.warp(); i < rows; i += team.warps()) {
        double sum = 0;
        for (int j = team.lane(); j < columns; j += WARP) sum += double(M[(long long)i * ld + j]) * v[j];
        sum = across_warp<Sum>(sum);
        if (team.lane() == 0) out[i] = sum;
    }
}

// out <- M' right, likewise: a thread for each column, or several where the team has more threads than there are columns,
// for what takes time is waiting for memory. Ends with a barrier, and uses the scratch memory.
template <class T, class Team>
DIFFOPT_STEP void times_transposed(
    const Team& team, const T* M, int rows, int columns, int ld, const double* right, double* out) {
    const double* v = in_shared(right);
    const int parts = columns > 0 && columns < team.size ? team.size / columns : 1;
    if (parts == 1) {
        for (int j = team.rank; j < columns; j += team.size) {
            double sum = 0;
#pragma unroll 8
            for (int i = 0; i < rows; ++i) sum += double(M[(long long)i * ld + j]) * v[i];
            out[j] = sum;
        }
        team.sync();
        return;
    }
    const int j = team.rank % columns, part = team.rank / columns;
    if (part < parts) {
        double sum = 0;
#pragma unroll 8
        for (int i = part; i < rows; i += parts) sum += double(M[(long long)i * ld + j]) * v[i];
        team.scratch[team.rank] = sum;
    }
    team.sync();
    if (part == 0) {
        double sum = team.scratch[j];
        for (int other = 1; other < parts; ++other) sum += team.scratch[other * columns + j];
        out[j] = sum;
    }
    team.sync();
}

}  // namespace diffopt
