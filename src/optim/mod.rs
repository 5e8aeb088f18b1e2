//! Optimizers, rate schedules and clipping over one flat vector of parameters.
