"""Ask a model something, with the collaborative prompt that it carries."""

from pathlib import Path

from compresso import checkpoint
from compresso.batches import Encoder
from compresso.evaluate import answer
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.workbench import console


def chat(model: str, message: str | None = None, prompt: str | None = None, max_new_tokens: int = 256) -> str | None:
    """Answer one message, or each line that is typed until an empty one.

    `model` is a run folder, a checkpoint or a hub id. `prompt` replaces the stored
    collaborative prompt, by name or file.
    """
    folder = Path(model) / "model"
    loaded, tokenizer = checkpoint.load(str(folder) if folder.is_dir() else model)
    form = "chat" if tokenizer.chat_template else "alpaca"
    stored = checkpoint.prompt_of(loaded)
    if prompt is not None:
        used = find_prompt(prompt, stored.format if stored else form)
    else:
        used = stored or CollaborativePrompt("none", "", form)
    encoder = Encoder(tokenizer, max_length=0, context=getattr(loaded.config, "max_position_embeddings", None))
    if message is not None:
        reply = answer(loaded, encoder, used, message, max_new_tokens)
        console.print(reply, markup=False)
        return reply
    console.print("An empty line ends the conversation; every question stands alone.")
    while True:
        try:
            message = console.input("> ").strip()
        except EOFError:
            return None
        if not message:
            return None
        console.print(answer(loaded, encoder, used, message, max_new_tokens), markup=False)
