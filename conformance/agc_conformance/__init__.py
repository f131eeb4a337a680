"""The conformance suite.

A vector is a question with its answer, one line of a file in ``vectors/v1``. It travels one way:

1. :mod:`vectors` reads the files, and :mod:`runner` looks up the *kind* of each vector.
2. A *wing* runs it. There is one for each subject: :mod:`core` (level 0: configurations, units,
   plans), :mod:`clipping` (AGC) and :mod:`sharpness` (SAM). The rooms of a wing are ``problems``
   (parse a vector once, into a typed question), ``ask`` (put it to a backend) and ``compare``
   (judge the answer).
3. A backend answers: the :mod:`reference <backends.reference>`, an adapter, or third-party code.
   All of them are in :mod:`backends`; :mod:`backend` is the protocol and :mod:`load` finds one by
   name.
4. The :mod:`verdict` becomes one of the :mod:`records` of a result file; :mod:`report` presents the
   files.

Two wings compute their questions instead of reading them: :mod:`nfnets` and :mod:`training`, which
trains on real images (``ask``) and what recipes say (``recipes``; level 5).
:mod:`suite` runs everything on one backend, :mod:`apart` in a process that a backend may end.
:mod:`mutants` are wrong backends, one module for each wing, :mod:`teeth` shows that each of them is
caught, and :mod:`diagnosis` compares what a backend fails with what they fail. :mod:`generate`
makes the vector files, one module for each file.
"""
