// The columns of one block in GPTQ, compiled once for each instruction set (variants.h).

// Rows that are rounded at once.
constexpr int64_t ROWS = 16;

// See lq_gptq_block of gptq.cpp.
inline void gptq_block(double* w, const double* y, float* done, double* total, const double* turned, int64_t stride, const float* scale,
                       const float* zero_point, int64_t columns, int64_t rows, int quant_min, int quant_max, int threads) {
    const float least = static_cast<float>(quant_min), most = static_cast<float>(quant_max);
    LQ_PARALLEL(columns * rows)
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t n = std::min(ROWS, rows - first);
        // What rounding has taken off the columns that are done.
        std::vector<double> taken(static_cast<size_t>(columns * ROWS));
        for (int64_t j = columns - 1; j >= 0; --j) {
            const int64_t at = j * rows + first;
            const double pivot = turned[j * stride + j];
            double sum[ROWS], weight[ROWS];
            float x[ROWS], inverse[ROWS], low[ROWS], high[ROWS], step[ROWS], level[ROWS];
            for (int64_t k = 0; k < ROWS; ++k) {
                sum[k] = k < n ? y[at + k] : 0.0;
                weight[k] = k < n ? w[at + k] : 0.0;
                const float z = k < n ? zero_point[at + k] : 0.0f;
                step[k] = k < n ? scale[at + k] : 1.0f;
                inverse[k] = 1.0f / step[k];
                low[k] = least - z;
                high[k] = most - z;
            }
            for (int64_t i = columns - 1; i > j; --i) {
                const double share = turned[j * stride + i];
                const double* before = &taken[i * ROWS];
                for (int64_t k = 0; k < ROWS; ++k) sum[k] += share * before[k];
            }
            for (int64_t k = 0; k < ROWS; ++k) x[k] = static_cast<float>(weight[k] + sum[k] / pivot);
            unsigned bits;
            store(level, quantized(load(x), Q{load(inverse), load(low), load(high), load(step)}, bits));
            for (int64_t k = 0; k < ROWS; ++k) taken[j * ROWS + k] = weight[k] - static_cast<double>(level[k]);
            for (int64_t k = 0; k < n; ++k) {
                const double error = sum[k] + taken[j * ROWS + k] * pivot;
                total[first + k] += error * error;
                w[at + k] = taken[j * ROWS + k];
                done[at + k] = level[k];
            }
        }
    }
}
