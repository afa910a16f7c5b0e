"""The user's documentation: every Python snippet and YAML block, run as it stands.

Only the import path is ours (`jaxtrain` for `src.core` and `src.training`). What the
page leaves to the reader (data, a model's name, how long to train) is set up around
the snippets: the embedded model stands where they name one from the hub.
"""

import importlib.util
import json
import logging
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from jaxtrain import assets
from jaxtrain.config import ConfigManager, resolve
from jaxtrain.model_manager import ModelManager
from jaxtrain.trainer import TrainingOrchestrator
from jaxtrain.types import WeightedSum

ORCHESTRATOR = """
from jaxtrain.config import ConfigManager
from jaxtrain.trainer import TrainingOrchestrator

# Initialize components
config = ConfigManager()
config.load_config("config.yaml")

trainer = TrainingOrchestrator(config)

# Prepare for training
success = trainer.prepare_training(
    training_type="dpo",
    model_name="Qwen/Qwen2.5-3B"
)

if success:
    # Load training data
    train_dataset = trainer.load_training_data("./data/train")
    eval_dataset = trainer.load_evaluation_data("./data/eval")
    
    # Start training
    results = trainer.train(
        train_dataset=train_dataset,
        eval_dataset=eval_dataset
    )
    
    print(f"Training completed. Final loss: {results['final_loss']:.4f}")
    print(f"Best model saved to: {results['best_model_path']}")
else:
    print("Training preparation failed")
"""

DPO_ROW = """
{
  "prompt": "What is the capital of France?",
  "chosen": "The capital of France is Paris, a beautiful city known for its culture and history.",
  "rejected": "I think it might be Lyon or maybe Marseille, I'm not really sure."
}
"""  # noqa: E501

DPO = """
from jaxtrain.dpo_trainer import DPOTrainer
from jaxtrain.model_manager import ModelManager

# Initialize components
model_manager = ModelManager(config)
model_manager.load_model()

dpo_trainer = DPOTrainer(
    model=model_manager.model,
    tokenizer=model_manager.tokenizer,
    config=config
)

# Prepare DPO dataset
dpo_dataset = dpo_trainer.prepare_dataset(preference_data)

# Train with DPO
results = dpo_trainer.train(
    train_dataset=dpo_dataset,
    eval_dataset=eval_dpo_dataset
)

print(f"DPO training completed. Final reward margin: {results['reward_margin']:.4f}")
"""

METRICS = """
from jaxtrain.metrics import MetricsCalculator

# Initialize metrics calculator
metrics_calc = MetricsCalculator(config)

# Compute training metrics
training_metrics = metrics_calc.compute_training_metrics(
    predictions=model_outputs,
    references=ground_truth,
    loss=current_loss
)

# Compute evaluation metrics
eval_metrics = metrics_calc.compute_evaluation_metrics(
    model=model,
    eval_dataset=eval_data,
    tokenizer=tokenizer
)

# Log metrics
metrics_calc.log_metrics({
    **training_metrics,
    **eval_metrics,
    "epoch": current_epoch,
    "step": current_step
})
"""

DISTRIBUTED = """
# Configure distributed training
config.training.distributed = True
config.training.num_gpus = 4
config.training.gradient_accumulation_steps = 8

# Initialize with Accelerate
from accelerate import Accelerator

accelerator = Accelerator(
    gradient_accumulation_steps=config.training.gradient_accumulation_steps,
    mixed_precision="fp16",
    log_with="wandb"
)

# Training orchestrator will automatically use distributed setup
trainer = TrainingOrchestrator(config, accelerator=accelerator)
"""

MEMORY = """
# Enable memory optimizations
config.training.gradient_checkpointing = True
config.training.fp16 = True
config.training.dataloader_pin_memory = True
config.training.dataloader_num_workers = 4

# DeepSpeed integration
config.training.deepspeed = {
    "zero_stage": 2,
    "offload_optimizer": True,
    "offload_param": True
}
"""

CURRICULUM = """
# Configure curriculum learning
config.training.curriculum = {
    "enabled": True,
    "strategy": "length_based",  # length_based, difficulty_based
    "start_length": 128,
    "end_length": 2048,
    "steps": 1000
}
"""

CUSTOM = '''
class CustomTrainer(TrainingOrchestrator):
    def custom_training_step(self, batch, model, optimizer):
        """Custom training step with additional logic."""
        # Custom preprocessing
        batch = self.preprocess_batch(batch)
        
        # Forward pass
        outputs = model(**batch)
        loss = outputs.loss
        
        # Custom loss modifications
        if self.config.training.use_auxiliary_loss:
            aux_loss = self.compute_auxiliary_loss(outputs)
            loss = loss + 0.1 * aux_loss
        
        # Backward pass
        self.accelerator.backward(loss)
        
        return {"loss": loss.item(), "aux_loss": aux_loss.item()}
'''

YAML = {
    "from_scratch": """
training:
  training_type: "from_scratch"
  from_scratch:
    num_train_epochs: 3
    per_device_train_batch_size: 4
    per_device_eval_batch_size: 4
    gradient_accumulation_steps: 8
    learning_rate: 5e-5
    weight_decay: 0.01
    warmup_steps: 500
    max_grad_norm: 1.0
""",
    "sft": """
training:
  training_type: "sft"
  sft:
    num_train_epochs: 3
    per_device_train_batch_size: 8
    learning_rate: 2e-5
    warmup_ratio: 0.1
    lr_scheduler_type: "cosine"
""",
    "lora": """
training:
  training_type: "lora"
  lora:
    enabled: true
    r: 16
    lora_alpha: 32
    lora_dropout: 0.1
    target_modules: ["q_proj", "v_proj", "k_proj", "o_proj"]
    bias: "none"
    task_type: "CAUSAL_LM"
""",
    "dpo": """
training:
  training_type: "dpo"
  dpo:
    num_train_epochs: 1
    per_device_train_batch_size: 2
    per_device_eval_batch_size: 2
    gradient_accumulation_steps: 16
    learning_rate: 1e-6
    beta: 0.1
    max_length: 1024
    max_prompt_length: 512
""",
    "high_performance": """
training:
  training_type: "from_scratch"
  
  # Optimization settings
  fp16: false
  bf16: true
  gradient_checkpointing: true
  dataloader_num_workers: 8
  dataloader_pin_memory: true
  
  # Distributed settings
  distributed: true
  num_gpus: 8
  gradient_accumulation_steps: 4
  
  # Performance tuning
  max_grad_norm: 1.0
  warmup_ratio: 0.05
  lr_scheduler_type: "cosine_with_restarts"
  
  # Memory optimization
  deepspeed:
    zero_stage: 3
    offload_optimizer: true
    offload_param: true
""",
    "memory_efficient": """
training:
  training_type: "lora"
  
  # LoRA settings for efficiency
  lora:
    r: 8  # Lower rank for memory efficiency
    lora_alpha: 16
    target_modules: ["q_proj", "v_proj"]  # Fewer modules
  
  # Memory optimizations
  gradient_checkpointing: true
  fp16: true
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 32
  
  # CPU offloading
  cpu_offload: true
  pin_memory: false
""",
    "experimental": """
training:
  training_type: "dpo"
  
  # DPO specific settings
  dpo:
    beta: 0.1
    max_length: 512  # Shorter for faster iteration
    reference_free: false
  
  # Quick iteration settings
  num_train_epochs: 1
  eval_steps: 50
  save_steps: 100
  logging_steps: 10
  
  # Experiment tracking
  report_to: ["wandb", "tensorboard"]
  run_name: "dpo_experiment_v1"
""",
}


class Recorded:
    """A stand-in for wandb where that is not installed: it keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.config = types.SimpleNamespace(update=lambda *a, **k: None)

    def log(self, numbers, step):
        self.logged.append(numbers)

    def finish(self):
        pass


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The reader's directory: data of the documented form, and a model by that name."""
    monkeypatch.chdir(tmp_path)
    row = json.loads(DPO_ROW)
    for split, count in (("train", 40), ("eval", 4)):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        rows = [{**row, "prompt": f"{n}. {row['prompt']}"} for n in range(count)]
        lines = "\n".join(json.dumps(r) for r in rows)
        (folder / "pairs.jsonl").write_text(lines)
    shutil.copytree(assets.asset_path(assets.MODEL), tmp_path / "Qwen" / "Qwen2.5-3B")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if importlib.util.find_spec("wandb") is None:
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.util.spec_from_loader("wandb", None)
        module.init = lambda **options: Recorded()
        module.Table = types.SimpleNamespace
        monkeypatch.setitem(sys.modules, "wandb", module)
    return tmp_path


def run_snippet(snippet, **names):
    names["__name__"] = "snippet"
    exec(compile(snippet, "<documentation>", "exec"), names)
    return names


def quickly(text: str, **settings) -> str:
    """The YAML block with our lines below it, at the level of `training`'s keys."""
    lines = {"max_steps": 2, "save_steps": 0, "num_gpus": 1} | settings
    return text + "".join(f"  {name}: {json.dumps(v)}\n" for name, v in lines.items())


def loaded(text: str, **settings) -> ConfigManager:
    pathlib.Path("config.yaml").write_text(quickly(text, **settings))
    config = ConfigManager()
    config.load_config("config.yaml")
    return config


@pytest.mark.slow
def test_the_orchestrator_example(project, capsys):
    text = quickly(YAML["dpo"], logging_steps=1).replace("max_steps: 2", "max_steps: 1")
    (project / "config.yaml").write_text(text)
    names = run_snippet(ORCHESTRATOR)
    results = names["results"]
    printed = capsys.readouterr().out
    # Nothing has been learnt before the first step: the loss is -log sigma(0).
    assert results["final_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert "Training completed. Final loss: 0.6931" in printed
    assert f"Best model saved to: {results['best_model_path']}" in printed
    assert (pathlib.Path(results["best_model_path"]) / "model.safetensors").is_file()
    shutil.rmtree(project / "Qwen")
    run_snippet(ORCHESTRATOR)
    assert "Training preparation failed" in capsys.readouterr().out


def test_the_dpo_example_learns_its_pairs(project, capsys):
    config = loaded(YAML["dpo"], gradient_accumulation_steps=1)
    config.training.dpo.learning_rate = 1e-3
    config.training.dpo.gradient_accumulation_steps = 1
    config.training.max_steps = 6
    rows = (project / "data" / "train" / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    names = run_snippet(
        DPO, config=config, preference_data=rows[4:], eval_dpo_dataset=rows[:4]
    )
    results = names["results"]
    margin = results["reward_margin"]
    assert margin > 0.1
    assert results["accuracy"] == 1.0
    assert results["eval_kl"] != 0
    printed = capsys.readouterr().out
    assert f"DPO training completed. Final reward margin: {margin:.4f}" in printed


def test_the_metrics_example(caplog):
    config = ConfigManager()
    config.training.num_gpus = 1
    config.training.generation.metrics = ("exact_match", "bleu", "rouge")
    manager = ModelManager(config)
    manager.load_model()
    eval_data = [
        {"prompt": "And God said, Let there be", "completion": " light."},
        {"prompt": "The LORD is my", "completion": " shepherd."},
    ]
    with caplog.at_level(logging.INFO, "jaxtrain"):
        names = run_snippet(
            METRICS,
            config=config,
            model=manager.model,
            tokenizer=manager.tokenizer,
            eval_data=eval_data,
            model_outputs=types.SimpleNamespace(logits=np.eye(4)[[[1, 2, 3]]]),
            ground_truth=np.array([[1, 2, -100]]),
            current_loss=0.5,
            current_epoch=1,
            current_step=10,
        )
    assert names["training_metrics"]["token_accuracy"] == 1.0
    found = names["eval_metrics"]
    assert {"eval_loss", "eval_perplexity", "eval_bleu", "eval_rougeL"} <= set(found)
    # The embedded model has read this text; a uniform guess is log(vocabulary) = 6.9.
    assert 0 < found["eval_loss"] < 5
    assert "step 10: loss 0.5" in caplog.text
    texts = manager.model.generate([row["prompt"] for row in eval_data])
    scored = names["metrics_calc"].compute_text_metrics(
        texts, [row["completion"] for row in eval_data]
    )
    assert found["eval_rougeL"] == scored["rougeL"]


class Accelerator:
    """What we read of `accelerate.Accelerator` (which refuses fp16 without a GPU)."""

    def __init__(self, gradient_accumulation_steps, mixed_precision, log_with):
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.mixed_precision = mixed_precision
        self.log_with = [types.SimpleNamespace(value=log_with)]


@pytest.mark.slow
def test_the_distributed_memory_and_curriculum_examples(project, monkeypatch, caplog):
    """All three on one run: four devices, float16, offloaded, short rows first."""
    module = types.ModuleType("accelerate")
    module.Accelerator = Accelerator
    monkeypatch.setitem(sys.modules, "accelerate", module)
    config = ConfigManager()
    run_snippet(MEMORY, config=config)
    run_snippet(CURRICULUM, config=config)
    with caplog.at_level(logging.DEBUG, "jaxtrain"):
        names = run_snippet(
            DISTRIBUTED, config=config, TrainingOrchestrator=TrainingOrchestrator
        )
        assert names["trainer"].prepare_training(), caplog.text
    run = names["trainer"].run
    assert run.loop.gradient_accumulation_steps == 8
    assert run.precision.compute_dtype == "float16"
    assert "wandb" in run.loop.report_to
    assert (run.mesh.sizes["data"], run.devices.num_gpus) == (4, 4)
    assert (
        run.devices.deepspeed.offload_optimizer and run.devices.deepspeed.offload_param
    )
    assert run.curriculum.end_length == run.data.max_length == 2048
    # The log says what each of them became.
    for words in (
        "devices and processes are those of the jax mesh",
        "optimizer state split over devices",
        "optimizer state and parameters in pinned host memory",
        "128 to 2048 tokens in 1000 steps",
    ):
        assert words in caplog.text
    # Worker processes start slowly; that they change no batch is tested with the data.
    config.training.dataloader_num_workers = 0
    config.training.max_steps, config.training.save_steps = 1, 0
    config.training.save_final_model = False
    config.training.per_device_train_batch_size = 1
    config.data.max_train_rows, config.data.max_eval_rows = 64, 8
    trainer = TrainingOrchestrator(config, accelerator=names["accelerator"])
    assert trainer.prepare_training(), caplog.text
    results = trainer.train()
    assert results["global_step"] == 1
    assert np.isfinite(results["final_loss"])


def test_a_torch_training_step_is_refused_with_what_to_override(project):
    with pytest.raises(TypeError, match=r"compute_auxiliary_loss.*use_auxiliary_loss"):
        run_snippet(CUSTOM, TrainingOrchestrator=TrainingOrchestrator)


@pytest.mark.parametrize("name", ["training_step", "compute_loss"])
def test_so_are_the_methods_of_other_trainers(name):
    with pytest.raises(TypeError, match=rf"Own\.{name} would never run"):
        type("Own", (TrainingOrchestrator,), {name: lambda self, *arguments: None})


@pytest.mark.slow
def test_the_custom_trainer_in_its_jax_form(project):
    """The documented loss + 0.1 * auxiliary loss, as one pure method."""

    class CustomTrainer(TrainingOrchestrator):
        def compute_auxiliary_loss(self, outputs, batch):
            negentropy = -(outputs.entropy * batch.loss_mask).sum()
            return WeightedSum(negentropy, batch.loss_mask.sum())

    config = loaded(YAML["sft"], logging_steps=1)
    config.training.use_auxiliary_loss = True
    config.training.sft.per_device_train_batch_size = 2
    config.training.save_final_model = False
    config.data.max_train_rows, config.data.max_eval_rows = 8, 2
    trainer = CustomTrainer(config)
    assert trainer.prepare_training()
    results = trainer.train()
    assert results["aux_loss"] < 0
    assert results["final_loss"] == results["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", YAML)
def test_a_yaml_example_trains(name, project):
    """It resolves as it stands; then two steps of it on few short rows."""
    (project / "config.yaml").write_text(YAML[name])
    config = ConfigManager()
    config.load_config("config.yaml")
    run = resolve(config, device_count=8)
    assert not [note for note in run.notes if note.kind == "inactive"]
    block = config.training[run.training_type]
    limits = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    limits["gradient_accumulation_steps"] = 2
    for key, value in limits.items():
        config.training[key] = value
        if block[key] is not None:
            block[key] = value
    if run.devices.num_gpus is None:
        config.training.num_gpus = 1
    config.training.dataloader_num_workers = 0  # they start slowly
    config.training.max_steps = 2
    config.training.logging_steps = 1
    config.data.max_length = 64
    if run.dpo is not None:
        config.training.dpo.max_length, config.training.dpo.max_prompt_length = 64, 32
    config.data.max_train_rows, config.data.max_eval_rows = 64, 8
    config.model.architecture.num_hidden_layers = 2
    trainer = TrainingOrchestrator(config)
    trainer.prepare()
    results = trainer.train()
    assert results["global_step"] == 2
    assert np.isfinite(results["final_loss"])
    assert np.isfinite(results["eval_loss"])
    workdir = project / "out" / (run.loop.run_name or run.training_type)
    assert pathlib.Path(results["best_model_path"]) == workdir.relative_to(project) / (
        "model"
    )
    assert (workdir / "metrics.jsonl").is_file()
    assert (workdir / "tensorboard").is_dir() == ("tensorboard" in run.loop.report_to)
