"""The default prompts: short and long, prose, code, numbers, other scripts."""

PROMPTS = (
    "A",
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    ",
    "1 2 4 8 16 32",
    "Zażółć gęślą jaźń. Съешь же ещё этих мягких булок. 色は匂へど散りぬるを",
    "Once upon a time there was a number that nobody had ever written down, because",
    '{"name": "norm", "eps": 1e-06, "weight": [0.25, 1.5, -2.0], "residual": null, "next": ',
    "SELECT layer, COUNT(*) FROM calls WHERE reason <> '' GROUP BY layer ORDER BY",
    "Dear colleagues,\n\nthe server was restarted last night after its answers had changed. We looked at the logs and",
    "Q: What does a layer norm do?\nA: It subtracts the mean.\nQ: And what does RMSNorm leave out?\nA:",
    "x" * 90,
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of "
    "outrageous fortune, or to take arms against a sea of troubles",
)
