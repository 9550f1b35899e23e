/* Sums of the models by weights that each row has for itself, told by the row's norms and angles:
 * NuSLERP and Model Stock by rows. */
#ifndef OUTLIERMERGE_ROW_SUMS_H
#define OUTLIERMERGE_ROW_SUMS_H

#include "gram.h"
#include "method.h"

/* The inner product of two rows, in double. */
static double product_of(const float *a, const float *b, size_t num) {
    Lanes sums = {{{0}}};
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++)
            sums.parts[part] = added_product(doubles_of(a + i + part * WIDTH),
                                             doubles_of(b + i + part * WIDTH), sums.parts[part]);
    for (size_t lane = 0; i < num; i++, lane++)
        sums.parts[lane / WIDTH][lane % WIDTH] += (double)a[i] * b[i];
    return sum_of(sums);
}

/* See nuslerp.py. Vector: the weights. */
static void interpolate_row(Rows *rows, const WholeRow *row, void *with) {
    const double least_length = 1e-7, least_sine = 1e-6;
    const float *weights = with;
    float *restrict first = row->values, *restrict second = row->values + row->apart;
    const size_t num = rows->elements;
    const double total = (double)weights[0] + weights[1];
    const double t = fabs(total) < 1e-6 ? 0.5 : weights[1] / total;
    double lengths[2] = {sqrt(product_of(first, first, num)), sqrt(product_of(second, second, num))};
    for (int i = 0; i < 2; i++)
        if (lengths[i] < least_length) lengths[i] = least_length;
    const double cosine = product_of(first, second, num) / (lengths[0] * lengths[1]);
    double for_first = 1 - t, for_second = t;
    if (1 - cosine * cosine > least_sine * least_sine) {
        const double angle = acos(cosine), sine = sin(angle);
        for_first = sin((1 - t) * angle) / sine;
        for_second = sin(t * angle) / sine;
    }
    const float one = (float)for_first, other = (float)for_second;
    for (size_t i = 0; i < num; i++) first[i] = first[i] * one + second[i] * other;
}

static int prepare_nuslerp_rows(Block *block, Call *call, size_t piece, size_t num) {
    return work_on_rows(block, call->rows, interpolate_row, (void *)call->vectors, piece, num);
}

static const Method nuslerp_rows = {"nuslerp_rows", 0, 1, merge_made, prepare_nuslerp_rows};

/* See model_stock.py. Scalar: whether products of norms are at least 1e-6, as in mergekit. */
static void draw_row_to_base(Rows *rows, const WholeRow *row, void *with) {
    const double least = *(const float *)with != 0 ? 1e-6 : 0, singular = 1e-6;
    const size_t num = rows->elements, models = row->models;
    double lengths[MAX_SOURCES], cosines = 0;
    for (size_t i = 0; i < models; i++) {
        const float *own = row->values + i * row->apart;
        lengths[i] = sqrt(product_of(own, own, num));
    }
    for (size_t i = 0; i < models; i++)
        for (size_t j = i + 1; j < models; j++) {
            double lengths_of_both = lengths[i] * lengths[j];
            if (lengths_of_both < least) lengths_of_both = least;
            if (lengths_of_both == 0) lengths_of_both = 1; /* no direction: a cosine of 0 */
            double cosine = product_of(row->values + i * row->apart,
                                       row->values + j * row->apart, num) / lengths_of_both;
            cosines += cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
        }
    const double cosine = cosines / (double)(models * (models - 1) / 2);
    const double divisor = 1 + (double)(models - 1) * cosine;
    float weight = fabs(divisor) < singular ? 0 : (float)(cosine / divisor);
    if (!isfinite(cosine)) weight = 1 / (float)models; /* so that what is finite stays so */
    float *restrict sum = row->values;
    for (size_t model = 1; model < models; model++) {
        const float *restrict own = row->values + model * row->apart;
        for (size_t i = 0; i < num; i++) sum[i] += own[i];
    }
    scale_row(sum, weight, num);
}

static int prepare_model_stock_rows(Block *block, Call *call, size_t piece, size_t num) {
    return work_on_rows(block, call->rows, draw_row_to_base, (void *)call->scalars, piece, num);
}

static const Method model_stock_rows = {"model_stock_rows", 1, 0, merge_made,
                                        prepare_model_stock_rows};

#endif
