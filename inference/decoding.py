"""How answers are decoded where a checkpoint's own generation config is not to decide it."""

# Of beams and several sequences a request, a question or a measurement has no use.
ONE_ANSWER = {"num_beams": 1, "num_return_sequences": 1}
# The likeliest tokens; penalties of the generation config hold.
GREEDY = {**ONE_ANSWER, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
