/* Two or three models of one dtype, whose values stay in registers from their storage to the merged
 * value. Other blocks go row by row through the cache. The same operations in the same order give
 * the same bits. */
#ifndef OUTLIERMERGE_FEW_H
#define OUTLIERMERGE_FEW_H

#include "block.h"

/* The dtype of all models, or 0 where there are fewer or more, or several dtypes. */
static char code_of_few(const Block *block) {
    const size_t first = source_of(block, 0);
    const char code = block->places[first].code;
    int fits = block->num_models == 2 || block->num_models == 3;
    for (size_t model = 1; model < block->num_models && fits; model++)
        fits = block->places[first + model].code == code;
    return fits ? code : 0;
}

/* Where few models' elements of a step are. */
typedef struct {
    const char *from[3];
} Few;

static Few few_of(const Block *block, size_t start) {
    Few few = {{NULL}};
    for (size_t model = 0; model < block->num_models; model++)
        few.from[model] = at(block, source_of(block, model), start);
    return few;
}

/* Compile a statement for each dtype and number of models, in it constants CODE and MODELS, and
 * return after it; go on where there are not few models. */
#define RETURN_FOR_FEW(block, ...)                    \
    do {                                                    \
        const char code_of_all = code_of_few(block);        \
        if (code_of_all == 0) break;                        \
        if ((block)->num_models == 2) {                     \
            enum { MODELS = 2 };                            \
            FOR_DTYPE(code_of_all, __VA_ARGS__);              \
        } else {                                            \
            enum { MODELS = 3 };                            \
            FOR_DTYPE(code_of_all, __VA_ARGS__);              \
        }                                                   \
        return;                                             \
    } while (0)

#endif
