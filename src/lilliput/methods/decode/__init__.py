"""Several tokens a step, with the text that the model gives one token at a time; or an earlier first token.

from lilliput.methods.decode import DraftModel, GatedLoraMtp, KvPrediction, Medusa, Ngram, SpeculativeStreaming

model.generate(ids, custom_generate=Ngram())
model.generate(ids, custom_generate=DraftModel(tokens=4), draft_model=small)
model.generate(ids, custom_generate=Medusa(), heads=heads)  # heads = Medusa().train(workload)
model.generate(ids, custom_generate=GatedLoraMtp(), adapters=adapters)  # trained like heads, and so are
model.generate(ids, custom_generate=SpeculativeStreaming(), streams=streams)
model.generate(ids, custom_generate=KvPrediction(), predictor=predictor)  # predictor = KvPrediction().train(workload)

A drafter proposes tokens, the model checks all of them in one pass, and those that it would not have said are dropped.
Only `KvPrediction` gives another text than the model alone.
transformers hands no streamer to a loop of the user: bind it with `functools.partial(Ngram(), streamer=streamer)`, or
generate inside `lilliput.serving.accelerated(model, Ngram())`.
"""

from dataclasses import dataclass

from lilliput.methods import family_getattr


@dataclass
class Tally:
    """Counts of generations, filled by `model.generate(..., custom_generate=decoder, tally=tally)`."""

    steps: int = 0  # passes of the model, the prompt's included
    drafted: int = 0
    tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(1, self.steps)


__getattr__ = family_getattr(__name__, __path__)
