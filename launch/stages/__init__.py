"""The kinds of stages, by the name that pipeline.yaml gives them under `engine`."""

from importlib import import_module

from launch.run.folder import StageRun

# engine: module and class; imported when asked for.
STAGE_CLASSES = {
    "tokenizer": ("tokenizer", "TokenizerStage"),
    "held-out": ("held_out", "HeldOutStage"),
    "eval-texts": ("eval_texts", "EvalTextsStage"),
    "data": ("data", "DataStage"),
    "pretrain": ("pretrain", "PretrainStage"),
    "chats": ("chats", "ChatsStage"),
    "posttrain": ("posttrain", "PosttrainStage"),
    "merge": ("merge", "MergeStage"),
    "release": ("release", "ReleaseStage"),
    "eval": ("evaluate", "EvalStage"),
    "report": ("report", "ReportStage"),
}


def kind_of(engine: str) -> type[StageRun]:
    """The class of a kind of stage."""
    module, name = STAGE_CLASSES[engine]
    kind: type[StageRun] = getattr(import_module(f"launch.stages.{module}"), name)
    return kind
