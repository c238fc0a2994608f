// The columns of one block in GPTQ, compiled once for each instruction set (variants.h).

// Rows that are rounded at once.
constexpr int64_t ROWS = 16;

// See lq_gptq_block of gptq.cpp.
inline void gptq_block(const double* w, float* done, double* errors, const double* factor, int64_t stride, const float* scale,
                       const float* zero_point, int64_t columns, int64_t rows, int quant_min, int quant_max, int threads) {
    const float least = static_cast<float>(quant_min), most = static_cast<float>(quant_max);
    LQ_PARALLEL(columns * rows)
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t n = std::min(ROWS, rows - first);
        std::vector<double> tile(static_cast<size_t>(columns * ROWS));
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t k = 0; k < n; ++k) tile[j * ROWS + k] = w[j * rows + first + k];
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t at = j * rows + first;
            float x[ROWS], inverse[ROWS], low[ROWS], high[ROWS], step[ROWS], level[ROWS];
            for (int64_t k = 0; k < ROWS; ++k) {
                const float z = k < n ? zero_point[at + k] : 0.0f;
                step[k] = k < n ? scale[at + k] : 1.0f;
                inverse[k] = 1.0f / step[k];
                low[k] = least - z;
                high[k] = most - z;
                x[k] = static_cast<float>(tile[j * ROWS + k]);
            }
            unsigned bits;
            store(level, quantized(load(x), Q{load(inverse), load(low), load(high), load(step)}, bits));
            double error[ROWS];
            for (int64_t k = 0; k < ROWS; ++k)
                error[k] = (tile[j * ROWS + k] - static_cast<double>(level[k])) / factor[j * stride + j];
            for (int64_t k = 0; k < n; ++k) {
                done[at + k] = level[k];
                errors[at + k] = error[k];
            }
            for (int64_t i = j + 1; i < columns; ++i) {
                const double share = factor[j * stride + i];
                double* later = &tile[i * ROWS];
                for (int64_t k = 0; k < ROWS; ++k) later[k] -= share * error[k];
            }
        }
    }
}
