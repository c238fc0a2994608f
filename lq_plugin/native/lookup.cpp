// Rows of a table, quantized as they are read, what training adds to them, and the extremes of rows that were written to.
//
// The numbers are those of fake_quantize.cpp, whose loops these are; sums over rows that are read more than once are taken in the order of
// reading, as torch's embedding takes them. Plain C interface without torch headers: it compiles in seconds.

#include "common.h"

namespace {

// Where the scales of a table's rows come from: one for all, one for each part of a row, or the part's own extremes.
enum Ranges { ONE = 0, GIVEN = 1, OWN = 2 };
// Parts whose scales are found together, and that are asked of memory so long before their turn.
constexpr int64_t BATCH = 16;

// The rows `index` [count] of a table [rows][parts][n].
struct Rows {
    const int64_t* index;
    int64_t count, parts, n;
};
// How they are quantized; the values of a learned scale and zero point are not on their grid. zero_point may be null: all are 0.
struct Grid {
    const float *scale, *zero_point;
    Ranges ranges;
    int quant_min, quant_max;
    bool affine, learned;
};
// Copies of what was read: the rows, and the scale and the zero point of each part. Each may be null.
struct Taken {
    void* rows;
    float *scale, *zero_point;
};

// What LSQ's backward pass takes, of the forward pass, and where its sums go: with `dense_ranges` to those of the table, added up, else one
// for each part that is read; with `one` to a single one. `dense`: the same of the gradient of x. zero_point_result may be null.
struct Learned {
    const void* rows;                // [count][parts][n]
    const float *scale, *zero_point;  // [count][parts]; zero_point may be null, as in `Grid`
    float *scale_result, *zero_point_result;
    double factor;
    int64_t padding;  // a row that learns nothing
    int quant_min, quant_max;
    bool rounded, one, dense, dense_ranges;
};

}  // namespace

#define LQ_KERNELS "lookup.h"
#include "variants.h"

extern "C" {

// Arguments of lq_lookup: one pointer takes less of its callers' time than twenty arguments. All have eight bytes.
struct Lookup {
    int64_t types;
    const void* table;                 // [rows][parts][n]
    const int64_t* index;              // [count], of rows
    void* y;                           // [count][parts][n]
    uint16_t* mask;                    // may be null, as may be what follows
    const float *scale, *zero_point;   // [rows][parts], or [1]; see `Grid`
    void* taken_rows;                  // [count][parts][n]
    float *taken_scale, *taken_zero_point;  // [count][parts]
    int64_t rows, count, parts, n, ranges, quant_min, quant_max, affine, learned, variant, threads;
};

// Returns whether each index is one of the table's; nothing is written otherwise.
int lq_lookup(const Lookup* of) {
    for (int64_t i = 0; i < of->count; ++i)
        if (of->index[i] < 0 || of->index[i] >= of->rows) return 0;
    const Rows read{of->index, of->count, of->parts, of->n};
    const Grid grid{of->scale, of->zero_point, static_cast<Ranges>(of->ranges), static_cast<int>(of->quant_min),
                    static_cast<int>(of->quant_max), of->affine != 0, of->learned != 0};
    const Taken taken{of->taken_rows, of->taken_scale, of->taken_zero_point};
    const int types = static_cast<int>(of->types), threads = static_cast<int>(of->threads);
    const int64_t variant = of->variant;
    LQ_DISPATCH(lookup(types, of->table, read, grid, of->y, of->mask, taken, threads));
    return 1;
}

// Adds gradient: [count][parts][n], where the bit of mask (which may be null) is 1, to the rows `index` of sums: [rows][parts][n], all but
// the row `padding`.
void lq_add_rows(int types, const void* gradient, const int64_t* index, const uint16_t* mask, void* sums, int64_t count, int64_t parts,
                 int64_t n, int64_t padding, int variant, int threads) {
    LQ_DISPATCH(add_rows(types, gradient, Rows{index, count, parts, n}, mask, sums, padding, threads));
}

// Arguments of lq_learned_rows, all of eight bytes; see `Learned`.
struct LearnedRows {
    int64_t types;
    const void *gradient, *rows;  // [count][parts][n]
    const int64_t* index;
    const float *scale, *zero_point;
    void* result;  // may be null
    float *scale_result, *zero_point_result;
    double factor;
    int64_t count, parts, n, padding, quant_min, quant_max, rounded, one, dense, dense_ranges, variant, threads;
};

// LSQ's backward pass for rows that were read.
void lq_learned_rows(const LearnedRows* of) {
    const Rows read{of->index, of->count, of->parts, of->n};
    const Learned learned{of->rows,
                          of->scale,
                          of->zero_point,
                          of->scale_result,
                          of->zero_point_result,
                          of->factor,
                          of->padding,
                          static_cast<int>(of->quant_min),
                          static_cast<int>(of->quant_max),
                          of->rounded != 0,
                          of->one != 0,
                          of->dense != 0,
                          of->dense_ranges != 0};
    const int types = static_cast<int>(of->types), threads = static_cast<int>(of->threads);
    const int64_t variant = of->variant;
    LQ_DISPATCH(learned_rows(types, of->gradient, read, learned, of->result, threads));
}

// Whether low, high: [rows] are the extremes of the rows `index` of table: [rows][n]; never, where there is a NaN, or none of the rows.
int lq_rows_known(int types, const void* table, const int64_t* index, int64_t rows, int64_t count, int64_t n, const float* low,
                  const float* high, int variant) {
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= rows) return 0;
    return LQ_DISPATCH(rows_known(types, table, Rows{index, count, 1, n}, low, high));
}

// Looks at the rows `index` of table: [rows][n] again: low, high: [rows] are the extremes of each row, bounds: [2] those of all. Returns
// whether these have changed; -1 where a row is none of the table's, and nothing is written.
int lq_follow_rows(int types, const void* table, const int64_t* index, int64_t rows, int64_t count, int64_t n, float* low, float* high,
                    float* bounds, int variant) {
    for (int64_t i = 0; i < count; ++i)
        if (index[i] < 0 || index[i] >= rows) return -1;
    return LQ_DISPATCH(follow_rows(types, table, Rows{index, count, 1, n}, rows, low, high, bounds));
}
}
