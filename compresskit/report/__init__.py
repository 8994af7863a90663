"""From records to tables: join each record with its baseline, build rows, print them.

    join.load(paths) ──► Joined ──► table.build ──► Table ──► terminal.render   (rich)
                                                              markdown.render, csv.render
                                                              document.render   (JSON)
                                                              reading.read      (sentences)

Nothing here imports torch: a table of results can be made on any machine. A renderer knows no
metric; a metric knows no renderer.
"""
