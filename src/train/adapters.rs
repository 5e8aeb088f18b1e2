//! Adapters between PEFT's folders and the model's layers.

use candle_core::{Device, Tensor};

use crate::{
    Error, Result,
    export::{AdapterConfig, AdapterFolder, AdapterMatrix, select},
    model::{
        decoder::Decoder,
        lora::{Adapter, Shape},
    },
    recipe::Recipe,
    train::base::Base,
};

/// The adapter that a recipe starts from, before it takes memory: a plan comes first.
#[derive(Debug)]
pub struct Start {
    config: AdapterConfig,
    /// Which layers are adapted, and how.
    pub shapes: Vec<Shape>,
    /// Where it goes on from another.
    folder: Option<AdapterFolder>,
}

impl Start {
    /// A fresh one, or that of `adapter.start_from`.
    ///
    /// # Errors
    /// [`Error::Recipe`] where `target_modules` names nothing; [`Error::Input`] where the folder of `start_from` is
    /// unreadable or made for another base.
    pub fn of(recipe: &Recipe, base: &Base) -> Result<Self> {
        if let Some(folder) = &recipe.adapter.start_from {
            let folder = AdapterFolder::read(folder)?;
            let shapes = placed(&folder, &base.linears())?.into_iter().map(|(shape, _)| shape).collect();
            let mut config = folder.config.clone();
            config.lora_dropout = recipe.adapter.lora_dropout;
            // from here on it is an adapter of this base, whatever the start's was called
            config.base_model_name_or_path = Some(recipe.model.base.clone());
            config.revision = Some(recipe.model.revision.clone());
            return Ok(Self { config, shapes, folder: Some(folder) });
        }
        let mut config = AdapterConfig::of_recipe(&recipe.model, &recipe.adapter);
        config.fan_in_fan_out = base.config.family.transposed;
        let linears = base.linears();
        let names: Vec<String> = linears.iter().map(|(name, ..)| name.clone()).collect();
        let chosen = select(&recipe.adapter.target_modules, &names)?;
        let shape = |(linear, (module, inputs, outputs)): (usize, &(String, usize, usize))| {
            let (r, scale) = (config.rank_of(module)?, config.scale_of(module)?);
            Ok(Shape { module: module.clone(), linear, r, scale, inputs: *inputs, outputs: *outputs })
        };
        let adapted = linears.iter().enumerate().filter(|(_, (module, ..))| chosen.contains(module));
        let shapes = adapted.map(shape).collect::<Result<_>>()?;
        Ok(Self { config, shapes, folder: None })
    }

    /// The adapter itself, on the base's device.
    ///
    /// # Errors
    /// As [`from_folder`], and where the device has no room.
    pub fn make(self, recipe: &Recipe, base: &Base) -> Result<(AdapterConfig, Adapter)> {
        let adapter = match &self.folder {
            Some(folder) => from_folder(folder, base)?,
            None => Adapter::fresh(self.shapes, base.linears().len(), recipe.adapter.init_seed, &base.model.device)?,
        };
        Ok((self.config, adapter))
    }
}

/// An adapter on the base's device, from its folder.
///
/// # Errors
/// [`Error::Input`] where it was made for another base.
pub fn from_folder(folder: &AdapterFolder, base: &Base) -> Result<Adapter> {
    on_model(folder, &base.model)
}

/// An adapter on a model's device, from its folder.
///
/// # Errors
/// [`Error::Input`] where it was made for another model.
pub fn on_model(folder: &AdapterFolder, model: &Decoder) -> Result<Adapter> {
    let linears = model.linear_shapes();
    let (shapes, matrices): (Vec<_>, Vec<_>) = placed(folder, &linears)?.into_iter().unzip();
    let adapter = Adapter::zeros(shapes, linears.len(), &model.device)?;
    fill(&adapter, &matrices)?;
    Ok(adapter)
}

/// Puts the numbers of a folder into an adapter on `base`; whether it has the same matrices. No second adapter is made.
///
/// # Errors
/// As [`from_folder`].
pub fn restore(adapter: &Adapter, folder: &AdapterFolder, base: &Base) -> Result<bool> {
    let (shapes, matrices): (Vec<_>, Vec<_>) = placed(folder, &base.linears())?.into_iter().unzip();
    let same = shapes == adapter.shapes;
    if same {
        fill(adapter, &matrices)?;
    }
    Ok(same)
}

/// Matrix by matrix, in the order of the adapter's shapes.
fn fill(adapter: &Adapter, matrices: &[&AdapterMatrix]) -> Result<()> {
    let mut at = 0;
    for numbers in matrices.iter().flat_map(|matrix| [&matrix.a, &matrix.b]) {
        let numbers = Tensor::new(numbers.as_slice(), &Device::Cpu)?.to_device(adapter.values.device())?;
        adapter.values.slice_set(&numbers, 0, at)?;
        at += numbers.elem_count();
    }
    Ok(())
}

/// A folder's matrices beside their places in a model of these layers (name, inputs, outputs).
fn placed<'a>(
    folder: &'a AdapterFolder,
    linears: &[(String, usize, usize)],
) -> Result<Vec<(Shape, &'a AdapterMatrix)>> {
    folder.check_fits(linears)?;
    let mut placed = Vec::with_capacity(folder.matrices.len());
    for matrix in &folder.matrices {
        let linear = linears.iter().position(|(module, ..)| *module == matrix.module).ok_or_else(|| {
            Error::input(format!("the adapter has matrices for {:?}, which the base does not have", matrix.module))
        })?;
        let (module, scale) = (matrix.module.clone(), folder.config.scale_of(&matrix.module)?);
        let shape = Shape { module, linear, r: matrix.r, scale, inputs: matrix.input, outputs: matrix.output };
        placed.push((shape, matrix));
    }
    // The order of a fresh adapter: its values and an optimizer's moments lie side by side whatever file they come
    // from.
    placed.sort_by_key(|(shape, _)| shape.linear);
    Ok(placed)
}

/// The adapter as PEFT stores it.
pub fn to_folder(config: &AdapterConfig, adapter: &Adapter) -> Result<AdapterFolder> {
    let values = adapter.values.to_vec1::<f32>()?;
    let mut rest = values.as_slice();
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head.to_vec()
    };
    let matrix = |shape: &Shape| AdapterMatrix {
        module: shape.module.clone(),
        a: take(shape.r * shape.inputs),
        b: take(shape.outputs * shape.r),
        r: shape.r,
        input: shape.inputs,
        output: shape.outputs,
    };
    Ok(AdapterFolder { config: config.clone(), matrices: adapter.shapes.iter().map(matrix).collect() })
}
