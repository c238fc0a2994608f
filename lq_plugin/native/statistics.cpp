// What range estimators count and search, in one pass over memory. See `lq_plugin/native/statistics.py`.
//
// Plain C interface without torch headers: it compiles in a second.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
// Divergences this close, as a share of the number of values, are the same.
constexpr double TIE = 1e-12;
// Neighbours often fall into one bin: counting them in turn in several tables lets the processor overlap them.
constexpr int TABLES = 4;
constexpr int HALVES = 1 << 16, SIGN = 1 << 15;
// Elements that are counted before 32 bits could overflow.
constexpr int64_t MOST = int64_t{1} << 30;
// Numbers of kept bins that are computed first, to have a divergence that others can be dropped against.
constexpr int64_t SCOUTS = 16;
// Levels that are summed up before their sum is compared with the least one.
constexpr int64_t UNCHECKED = 8;

inline double x_log_x(double x) { return x > 0.0 ? x * std::log(x) : 0.0; }

// KL(P || Q) times the number of values, for one histogram; see `Divergence` of lq_plugin/ranges/estimators/kl.py.
struct Divergence {
    const double* counts;
    int64_t bins, levels;
    double total;
    std::vector<double> cumulated, entropy;
    std::vector<int64_t> occupied;

    Divergence(const double* counts, int64_t bins, double beyond, int64_t levels)
        : counts(counts), bins(bins), levels(levels), cumulated(bins + 1), entropy(bins + 1), occupied(bins + 1) {
        for (int64_t j = 0; j < bins; ++j) {
            cumulated[j + 1] = cumulated[j] + counts[j];
            entropy[j + 1] = entropy[j] + x_log_x(counts[j]);
            occupied[j + 1] = occupied[j] + (counts[j] > 0.0);
        }
        total = cumulated[bins] + beyond;
    }

    double mean(int64_t begin, int64_t end) const {
        return (cumulated[end] - cumulated[begin]) / static_cast<double>(std::max<int64_t>(occupied[end] - occupied[begin], 1));
    }

    double of_clipping(int64_t kept) const {
        const double inside = cumulated[kept], outliers = total - inside, last = counts[kept - 1];
        if ((outliers > 0.0 && last == 0.0) || inside < outliers) return INFINITE;
        if (outliers <= 0.0) return 0.0;
        const double level = std::max(mean((kept * (levels - 1) + levels - 1) / levels, kept), 1e-300);
        return x_log_x(last + outliers) - x_log_x(last) - outliers * std::log(level) - total * std::log(total / inside);
    }

    // What spreading the mass of one level evenly over its bins costs; never below 0.
    double of_level(int64_t begin, int64_t end) const {
        const double mass = cumulated[end] - cumulated[begin];
        return mass > 0.0 ? entropy[end] - entropy[begin] - mass * std::log(mean(begin, end)) : 0.0;
    }

    // Sum of both parts, or infinity as soon as it is above `most`: no level makes it smaller. `cost(longer, begin, end)`: of one level.
    template <class Cost>
    double at(int64_t kept, double clipping, double most, Cost cost) const {
        const int64_t whole = kept / levels, rest = kept % levels;
        double sum = clipping;
        // Bin j belongs to level floor(j * levels / kept): the next one begins at the first bin that is not below its edge.
        for (int64_t begin = 0, carry = 0, level = 0; level < levels;) {
            for (const int64_t stop = std::min(level + UNCHECKED, levels); level < stop; ++level) {
                carry += rest;
                const int64_t longer = carry > 0, end = begin + whole + longer;
                carry -= longer * levels;
                sum += cost(longer, begin, end);
                begin = end;
            }
            if (sum > most) return INFINITE;
        }
        return sum;
    }

    // The number of bins to keep, `levels..bins`, with the least divergence; the last on a tie.
    int64_t best() const {
        const int64_t first = levels;
        std::vector<double> value(bins - first + 1);
        for (int64_t kept = first; kept <= bins; ++kept) value[kept - first] = of_clipping(kept);
        const double tie = TIE * total;
        double least = INFINITE;
        const auto computed = [this](int64_t, int64_t begin, int64_t end) { return of_level(begin, end); };
        const int64_t step = std::max<int64_t>((bins - first) / SCOUTS, 1);
        for (int64_t kept = bins; kept >= first; kept -= step)
            least = std::min(least, at(kept, value[kept - first], least, computed));
        // Levels have one of two lengths, the same ones for as many numbers of bins as there are levels: with many levels it takes less
        // to compute all of a length, wherever they begin, than each as it comes.
        const bool tables = (bins / levels + 2) * bins < (bins - first) * levels;
        std::vector<double> costs(tables ? 2 * bins : 0);
        int64_t length = -1;
        const auto looked_up = [&costs, this](int64_t longer, int64_t begin, int64_t) { return costs[longer * bins + begin]; };
        for (int64_t kept = bins; kept >= first; --kept) {
            double& found = value[kept - first];
            const double most = least + tie;
            if (found > most) {
                found = INFINITE;
                continue;
            }
            if (tables && kept / levels != length) {
                const bool next = length == kept / levels + 1;  // its shorter levels are the longer ones now
                if (next) std::copy_n(costs.begin(), bins, costs.begin() + bins);
                length = kept / levels;
                for (int64_t longer = 0; longer < (next ? 1 : 2); ++longer)
                    for (int64_t begin = 0; begin + length + longer <= kept; ++begin)
                        costs[longer * bins + begin] = of_level(begin, begin + length + longer);
            }
            found = tables ? at(kept, found, most, looked_up) : at(kept, found, most, computed);
            least = std::min(least, found);
        }
        int64_t kept = bins;
        while (kept > first && value[kept - first] > least + tie) --kept;
        return kept;
    }
};

// How many of x: [n] have each upper half of their bits.
std::vector<uint32_t> counted(const float* x, int64_t n) {
    // Few numbers are not worth several tables.
    const int64_t whole = n < HALVES ? 0 : n - n % TABLES;
    std::vector<uint32_t> tables((whole ? TABLES : 1) * HALVES);
    for (int64_t i = 0; i < whole; i += TABLES) {
        uint64_t pairs[TABLES / 2];
        std::memcpy(pairs, x + i, sizeof pairs);
        for (int pair = 0; pair < TABLES / 2; ++pair) {
            // The order of two numbers in a pair does not matter: both halves are upper ones of either byte order.
            ++tables[(2 * pair) * HALVES + (pairs[pair] >> 48)];
            ++tables[(2 * pair + 1) * HALVES + (pairs[pair] >> 16 & (HALVES - 1))];
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        ++tables[bits >> 16];
    }
    if (whole)
        for (int half = 0; half < HALVES; ++half)
            for (int table = 1; table < TABLES; ++table) tables[half] += tables[table * HALVES + half];
    return tables;
}

}  // namespace

extern "C" {

// best: [rows], of counts: [rows][bins] and the mass above them.
void lq_least_divergence(const double* counts, const double* beyond, int64_t* best, int64_t rows, int64_t bins, int64_t levels, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) best[row] = Divergence(counts + row * bins, bins, beyond[row], levels).best();
}

// Adds x: [n] to counts: [2][bins], negative numbers first, by the upper half of the bits of their magnitude less `lowest`; smaller ones
// fall into the first bin. Returns how many have a half of 0: these are not counted.
int64_t lq_count_bins(const float* x, int64_t n, int64_t* counts, int64_t bins, int64_t lowest) {
    int64_t zeros = 0;
    for (int64_t first = 0; first < n; first += MOST) {
        const int64_t size = std::min(MOST, n - first);
        const std::vector<uint32_t> halves = counted(x + first, size);
        zeros += halves[0] + halves[SIGN];
        for (int64_t half = 1; half < SIGN; ++half) {
            const int64_t bin = std::min(std::max<int64_t>(half - lowest, 0), bins - 1);
            counts[bin] += halves[SIGN + half];
            counts[bins + bin] += halves[half];
        }
    }
    return zeros;
}
}
