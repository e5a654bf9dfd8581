"""Guides, of five minutes each.

- [Replace your Muon in five minutes](replace_your_muon.md)
- [In your trainer](trainers.md)
- [Fit a fine-tune in the memory you have](fit_a_finetune.md)
- [Which format?](formats.md)
- [Which rule?](which_rule.md)
- [Over several processes](distributed.md)
- [On a GPU](gpu.md)
- [Examples that run](gallery.md)
- [Questions and answers](faq.md)

<a id="replace_your_muon"></a>

.. include:: replace_your_muon.md

<a id="trainers"></a>

.. include:: trainers.md

<a id="fit_a_finetune"></a>

.. include:: fit_a_finetune.md

<a id="formats"></a>

.. include:: formats.md

<a id="which_rule"></a>

.. include:: which_rule.md

<a id="distributed"></a>

.. include:: distributed.md

<a id="gpu"></a>

.. include:: gpu.md

<a id="gallery"></a>

.. include:: gallery.md

<a id="faq"></a>

.. include:: faq.md
"""
