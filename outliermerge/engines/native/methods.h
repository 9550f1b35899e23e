/* The table of merge methods: include the header of a new method and add its name here. */
#ifndef OUTLIERMERGE_METHODS_H
#define OUTLIERMERGE_METHODS_H

#include "consensus.h"
#include "dare.h"
#include "della.h"
#include "fusion.h"
#include "min_sigma.h"
#include "nearswap.h"
#include "pcb.h"
#include "ram.h"
#include "row_sums.h"
#include "sce.h"
#include "ties.h"
#include "weighted_sum.h"

static const Method *const METHODS[] = {&arcee_fusion, &breadcrumbs, &consensus, &dare, &della,
                                       &min_sigma, &model_stock_rows, &nearswap, &nuslerp_rows, &pcb,
                                       &ram, &ramplus, &sce, &ties, &weighted_sum};
enum { NUM_METHODS = sizeof METHODS / sizeof *METHODS };

static const Method *find_method(const char *name) {
    for (size_t i = 0; i < NUM_METHODS; i++)
        if (strcmp(METHODS[i]->name, name) == 0) return METHODS[i];
    return NULL;
}

PyDoc_STRVAR(methods_doc,
             "methods() -> ((name, num_scalars, num_vectors), ...)\n\n"
             "The merge methods, and how many scalars and vectors of a number for each model they "
             "take.");

static PyObject *py_methods(PyObject *module, PyObject *args) {
    PyObject *found = PyTuple_New(NUM_METHODS);
    for (size_t i = 0; found != NULL && i < NUM_METHODS; i++) {
        PyObject *entry = Py_BuildValue("(snn)", METHODS[i]->name, METHODS[i]->num_scalars,
                                        METHODS[i]->num_vectors);
        if (entry == NULL)
            Py_CLEAR(found);
        else
            PyTuple_SET_ITEM(found, (Py_ssize_t)i, entry);
    }
    return found;
}

#endif
